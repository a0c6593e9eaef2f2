"""Writes the measured tables into the README: ``python bench/table.py benchmark.json README.md ["make bench"]``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

EAGER = ["torch for-loop", "torch foreach", "torch fused"]
RIVALS = [*EAGER, "torch.compile(step)", "ours eager", "ours compiled"]
Results = list[tuple[str, dict[str, Any]]]  # what stands in the brackets of a benchmark's name, and what it measured


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(row) + " |"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def ratio(value: float) -> str:
    return f"{value:.2f}x"


def steps(results: Results) -> Iterator[str]:
    rows = []
    for label, info in results:
        if times := info.get("milliseconds"):
            ratios = [info[f"{name}_over_ours"] for name in ("best_eager", "best_torch", "traffic")]
            cells = [number(times.get(rival)) for rival in RIVALS]
            rows.append(
                [label.replace("-", ", ", 1), *cells, *map(ratio, ratios), number(info["torch_compile_seconds"])]
            )
    ratios = ["best eager / ours", "best of torch / ours", "traffic alone / ours"]
    yield from table(["step", *RIVALS, *ratios, "s to torch.compile"], rows)


def eager(results: Results) -> Iterator[str]:
    names = ["torch for-loop", "torch foreach", "ours eager"]
    rows = [
        [
            label.replace("-", ", ", 1),
            *(number(info["eager_milliseconds"][name]) for name in names),
            ratio(info["ratio"]),
        ]
        for label, info in results
        if "eager_milliseconds" in info
    ]
    yield from table(["eager step, only the import changed", *names, "ours / better of torch"], rows)


def lbfgs(results: Results) -> Iterator[str]:
    names = ["torch", "ours eager", "ours compiled"]
    rows = [
        [
            label.removeprefix("torch.").replace("-", ", ") + " elements",
            *(number(info["lbfgs_milliseconds"][n]) for n in names),
            ratio(info["torch_over_compiled"]),
        ]
        for label, info in results
        if "lbfgs_milliseconds" in info
    ]
    yield from table(["LBFGS: update and direction, history 100", *names, "torch / ours"], rows)


def sparse(results: Results) -> Iterator[str]:
    names = ["torch", "ours eager", "ours compiled"]
    rows = [
        [label.replace("-", ", ", 1), *(number(info["sparse_milliseconds"][n]) for n in names), ratio(info["ratio"])]
        for label, info in results
        if "sparse_milliseconds" in info
    ]
    yield from table(["1,000 rows of 100,000 x 64", *names, "torch / ours"], rows)


def dtypes(results: Results) -> Iterator[str]:
    rows = []
    for label, info in results:
        for mix, row in info.get("by_dtypes", {}).items():
            ratios = [row.get(f"{name}_over") for name in ("float32", "torch_fused", "traffic_alone")]
            cells = [number(row["milliseconds"]), *("-" if r is None else ratio(r) for r in ratios)]
            rows.append([label.replace("-", ", ", 1), mix, *cells])
    names = ["dtypes", "ms", "float32 / this", "torch fused / this", "traffic alone / this"]
    yield from table(["step", *names], rows)


def averages(results: Results) -> Iterator[str]:
    rows = []
    for label, info in results:
        if times := info.get("average_microseconds"):
            cells = [number(times[name]) for name in ("torch", "lerp", "ours")]
            cells += [ratio(info["ratio"]), ratio(info["lerp_over"]), number(info["gigabytes_per_second"])]
            rows.append([label.replace("-", ", ", 1), *cells])
    names = ["torch", "`_foreach_lerp_` alone", "ours compiled", "torch / ours", "`_foreach_lerp_` / ours", "GB/s"]
    yield from table(["`AveragedModel.update_parameters`, us", *names], rows)


def host(results: Results) -> Iterator[str]:
    names = [*EAGER, "ours compiled"]
    rows = [
        [f"{label} tensors", *(f"{info['microseconds_per_tensor'][name]:.2f}" for name in names)]
        for label, info in results
        if "microseconds_per_tensor" in info
    ]
    yield from table(["microseconds per tensor of one element", *names], rows)


def first_step(results: Results) -> Iterator[str]:
    names = ["cold", "warm", "torch.optim"]
    rows = [
        [f"{info['tensors']} tensors", *(f"{info['seconds'][name]:.2f}" for name in names)]
        for _, info in results
        if "seconds" in info
    ]
    yield from table(["seconds to the first step, fresh process, without `import torch`", *names], rows)


def costs(results: Results) -> Iterator[str]:
    rows = []
    for label, info in results:
        if times := info.get("cost_milliseconds"):
            counts = [str(info[f"{what}_per_element"]) for what in ("bytes", "operations")]
            ratios = [ratio(info["predicted_over"][k]) for k in ("traffic alone", "step")]
            rows.append([", ".join(reversed(label.split("-"))), *counts, *map(number, times.values()), *ratios])
    names = ["bytes an element", "operations an element", "ms predicted", "traffic alone", "step"]
    yield from table(["33.6M elements", *names, "predicted / traffic alone", "predicted / step"], rows)


def loops(results: Results) -> Iterator[str]:
    for label, info in results:
        if rows := info.get("loops"):
            cells = []
            for way, row in rows.items():
                counts = [str(row.get(k, "-")) for k in ("graphs", "recompiles")]
                times = [number(row.get(k)) for k in ("seconds", "cached_seconds", "milliseconds")]
                cells.append([way, *counts, *times])
            head = [f"{label}", "graphs", "recompiles in 50 steps", "s to the first step", "s, model's graphs cached"]
            yield from table([*head, "ms an iteration"], cells)
            inside, compiled = rows["torch inside"], rows["ours inside, compiled"]
            cold, cached = (ratio(inside[k] / compiled[k]) for k in ("seconds", "cached_seconds"))
            yield ""
            yield f"First step, torch inside / ours inside, compiled: {cold}; with the model's graphs cached {cached}."


def backward(results: Results) -> Iterator[str]:
    for label, info in results:
        if times := info.get("backward_milliseconds"):
            kinds = ("gradient_mebibytes", "process_mebibytes")
            rows = [
                [way, number(ms), f"{info['over_ours'][way]:.2f}", *(number(info[kind][way]) for kind in kinds)]
                for way, ms in times.items()
            ]
            head = [f"an iteration of the {label}", "ms", "over ours", "MiB of gradients at most", "MiB of the process"]
            yield from table(head, rows)


def passes(results: Results) -> Iterator[str]:
    for label, info in results:
        if times := info.get("passes_milliseconds"):
            least = next(iter(times.values()))
            rows = [[name, number(ms), ratio(ms / least)] for name, ms in times.items()]
            yield from table([re.sub("^(masters|moments)-", r"\1, ", label), "ms", "over the first"], rows)


def reducing(results: Results) -> Iterator[str]:
    names = ["torch for-loop", "torch foreach", "ours eager", "ours compiled", "torch's products alone"]
    rows = []
    for label, info in results:
        if times := info.get("reducing_milliseconds"):
            cells = [number(times.get(name)) for name in names]
            rows.append([label.replace("-", ", ", 1), *cells, ratio(info["best_torch_over_ours"])])
    yield from table(["step of a rule that reduces", *names, "best of torch / ours compiled"], rows)


def norms(results: Results) -> Iterator[str]:
    rows = []
    for label, info in results:
        for what in ("norm", "zero"):
            if times := info.get(f"{what}_microseconds"):
                others = [f"{name}: {n:.1f}" for name, n in times.items() if name != "ours"]
                least = min(n for name, n in times.items() if name != "ours")
                rows.append(
                    [f"{what}, {label}", f"{times['ours']:.1f}", ", ".join(others), ratio(least / times["ours"])]
                )
    yield from table(["one pass over the gradients", "us, ours", "us, others", "best of others / ours"], rows)


def quick(results: Results) -> Iterator[str]:
    rows = []
    for label, info in results:
        if "over_quick" in info:
            times = info["microseconds"]
            ratios = ", ".join(f"{name}: {ratio(n)}" for name, n in info["over_quick"].items())
            rows.append([label.replace("-", ", ", 1), number(times["quick"]), number(times.get("host part")), ratios])
    yield from table(["a whole step", "us", "of it the host", "others / ours"], rows)


def _results(report: dict[str, Any]) -> Results:
    results: Results = []
    for entry in report["benchmarks"]:
        bracket = re.search(r"\[(.*)\]", entry["name"])
        results.append((bracket.group(1) if bracket else "", entry["extra_info"]))
    return results


def _first(results: Results, key: str) -> Any:
    return next(info[key] for _, info in results if key in info)


def _machine(report: dict[str, Any]) -> str:
    return str(report["machine_info"]["cpu"].get("brand_raw", "CPU"))


def _in_rotation(report: dict[str, Any], parts: Sequence[Callable[[Results], Iterator[str]]]) -> str:
    results = _results(report)
    lines = [
        f"Medians, all rows of a table in one run, in rotation, on the same tensors. {_machine(report)}, 2 cores, "
        f"a copy moves {_first(results, 'copy_gigabytes_per_second')} GB/s. torch 2.13.0, CPU.",
    ]
    for part in parts:
        lines += part(results)
    return "\n".join(lines)


def one_pass_tables(report: dict[str, Any]) -> str:
    """Of `make bench-one-pass`, which times only what surrounds a step."""
    return _in_rotation(report, (passes, norms, quick))


def reducing_tables(report: dict[str, Any]) -> str:
    """Of `make bench-reduce`, in milliseconds."""
    return _in_rotation(report, (reducing,))


def tables(report: dict[str, Any]) -> str:
    results = _results(report)

    def first(key: str) -> Any:
        return _first(results, key)

    machine = _machine(report)
    lines = [
        f"Median milliseconds, float32, everything included; all columns of a row in one run, in rotation, on the same "
        f"tensors. {machine}, 2 cores, a copy moves {first('copy_gigabytes_per_second')} GB/s. torch 2.13.0, CPU.",
    ]
    for part in (steps, dtypes, eager, lbfgs, sparse, averages, backward, loops, host, first_step, costs):
        lines += part(results)
    extra = first("extra_bytes") / 1024
    lines += [
        "",
        f"Peak memory of a step beyond what training holds: {extra:.0f} KiB with 1 GB of parameters and state.",
    ]
    return "\n".join(lines)


def insert(text: str, command: str, part: str) -> str:
    """Replaces what a command wrote into the README: what stands between its marker and the next end."""
    begin, end = f"<!-- benchmark table: generated by {command} -->", "<!-- end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n{part}\n{end}{rest.split(end, 1)[1]}"


def main(report: Path, readme: Path, command: str = "make bench") -> None:
    made = {"make bench-one-pass": one_pass_tables, "make bench-reduce": reducing_tables}.get(command, tables)
    readme.write_text(insert(readme.read_text(), command, made(json.loads(report.read_text()))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
