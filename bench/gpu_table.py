"""Writes what was measured on a GPU into the README: ``python bench/gpu_table.py benchmark-gpu.json README.md``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from table import insert, number, ratio, table

Report = dict[str, Any]


def model(result: Report) -> str:
    return f"{result['model']}, {result['dtype']}"


def of_a_copy(result: Report, name: str, report: Report) -> str:
    """Bytes that a step must move over its time, as a fraction of the speed of a copy."""
    speed = report.get("copy")
    return f"{1e-3 * result['bytes'] / result['device'][name] / speed:.2f}" if speed else "-"


def steps(report: Report) -> Iterator[str]:
    rivals = ["torch foreach", "torch fused", "ours", "ours, fused=True"]
    rows = [
        [
            model(result),
            *(number(result["device"][name]) for name in rivals),
            ratio(result["device"]["torch fused"] / result["device"]["ours"]),
            *(of_a_copy(result, name, report) for name in ("torch fused", "ours")),
            *(number(result["host"][name]) for name in rivals[1:]),
        ]
        for result in report["steps"]
    ]
    fractions = ["torch fused / ours", "torch fused, of a copy", "ours, of a copy"]
    host = [f"{name}, host" for name in rivals[1:]]
    yield from table(["AdamW, microseconds on the device", *rivals, *fractions, *host], rows)


def one_pass(report: Report) -> Iterator[str]:
    rivals = ["torch fused, separate passes", "ours, separate passes", "ours", "ours, fused=True"]
    rows = [
        [
            model(result),
            *(number(result["device"][name]) for name in rivals),
            ratio(result["device"][rivals[0]] / result["device"]["ours"]),
            of_a_copy(result, "ours", report),
            *(number(result["host"][name]) for name in rivals),
        ]
        for result in report["one_pass"]
    ]
    head = ["torch / ours", "ours, of a copy", *(f"{name}, host" for name in rivals)]
    yield from table(["clip + AdamW + average, bf16 with masters, microseconds", *rivals, *head], rows)


def algorithms(report: Report) -> Iterator[str]:
    rivals = ["torch foreach", "torch fused", "ours"]
    rows = [
        [
            result["algorithm"],
            *(number(result["device"].get(name)) for name in rivals),
            ratio(min(v for name, v in result["device"].items() if name != "ours") / result["device"]["ours"]),
            of_a_copy(result, "ours", report),
        ]
        for result in report["algorithms"]
    ]
    yield from table(["ResNet-50, fp32, microseconds", *rivals, "better of torch / ours", "ours, of a copy"], rows)


def blocks(report: Report) -> Iterator[str]:
    names = list(report["blocks"][0]["device"])
    rows = [[model(result), *(of_a_copy(result, name, report) for name in names)] for result in report["blocks"]]
    yield from table(["AdamW, of a copy, by blocks of threads", *names], rows)


def words(report: Report) -> Iterator[str]:
    host = ["same gradients", "new gradients", "giving them"]
    rows = [
        [
            f"{result['model']}, {result['words']} words",
            number(result["launches"]),
            *(number(result["device"][name]) for name in ("write", "pinned copy")),
            *(number(result["host"][name]) for name in (*host, "pinned copy")),
        ]
        for result in report["words"]
    ]
    head = ["microseconds", "writes", "write, device", "pinned copy, device", *(f"step, {name}, host" for name in host)]
    yield from table([*head, "pinned copy, host"], rows)


def graphs(report: Report) -> Iterator[str]:
    rows = [
        [
            model(result),
            *(number(result[where][name]) for where in ("device", "host") for name in ("torch fused", "ours")),
            ratio(result["device"]["torch fused"] / result["device"]["ours"]),
        ]
        for result in report["graphs"]
    ]
    head = ["torch fused, device", "ours, device", "torch fused, host", "ours, host", "torch fused / ours"]
    yield from table(["replay of a CUDA graph of one step, microseconds", *head], rows)


def first_step(report: Report) -> Iterator[str]:
    names = ["cold", "warm", "torch.optim"]
    rows = [
        [f"{result['tensors']} tensors", *(f"{result['seconds'][name]:.2f}" for name in names)]
        for result in report["first_step"]
    ]
    yield from table(["seconds to the first step, fresh process, without `import torch`", *names], rows)


def tables(report: Report) -> str:
    machine = report["machine"]
    copied = f"a copy moves {report['copy']:.0f} GB/s" if "copy" in report else "a copy was not measured"
    lines = [
        f"Medians of rivals in rotation on the same tensors. {machine['card']}, {copied}. torch {machine['torch']}, "
        f"triton {machine['triton']}, driver {machine['driver']}."
    ]
    for part in (steps, one_pass, algorithms, blocks, words, graphs, first_step):
        if part.__name__ in report:
            lines += part(report)
    for name, error in report.get("errors", {}).items():
        lines += ["", f"Not measured: {name} ({error})."]
    return "\n".join(lines)


def main(report: Path, readme: Path) -> None:
    readme.write_text(insert(readme.read_text(), "make bench-gpu", tables(json.loads(report.read_text()))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
