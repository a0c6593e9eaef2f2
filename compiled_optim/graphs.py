"""Records of what each rule becomes, to read and to compare: FX graph, C++, Triton, and what they cost.

    python -m compiled_optim.graphs graphs

A test compares the records with what the code makes now, so that a change to a kernel is seen in review. Two JSON files
beside them hold what takes long to find out: ``resources.json``, what machine code for GPUs uses, which is written with
the records, and ``measured.json``, which bench/measure_graphs.py writes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compiled_optim import algorithms
from compiled_optim._engine.kernels import backends
from compiled_optim._engine.kernels.trace import Signature
from compiled_optim._engine.torch_private import triton
from compiled_optim.declare import Flag
from compiled_optim.inspection import Inspection, describe, signature_of, switches_of
from compiled_optim.optimizer import Optimizer

GPUS = ("sm_80", "sm_90", "sm_100")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_INTRODUCTION = """\
# Kernels

Written by `make graphs`. Each record has the traced graph and the sources. A kernel is one launch for all tensors of a
step, and its intermediate results stay in registers: there are no temporaries. Bytes are those that a step reads and
writes of an element, of the minimum that the declaration implies. Registers of a thread, bytes spilled and the widest
loads are those of the machine code that Triton {triton} makes for {gpus}. Errors are those of the kernel in
Triton's interpreter against float64, relative where values exceed 1. The last two columns are of `compiled="foreach"`,
in which `torch.compile` lowers the same rule on a list of {counts} tensors: launches of a step, and seconds to
lower it for a GPU, without those to make machine code.
"""


@dataclass(frozen=True)
class Selection:
    """An algorithm, the options under which it is recorded, and the dtype whose sources are in the record."""

    name: str
    cls: type[Optimizer]
    options: Mapping[str, Any]
    dtype: str = "fp32"

    def inspect(self, dtype: str = "", target: str = "cpu", on_device: bool = False) -> Inspection:
        of_params = DTYPES[dtype or self.dtype]
        signature = signature_of(self.cls, self.options, of_params, target=target, on_device=on_device)
        return Inspection(signature, portable=True)

    def resources(self, dtype: str, gpu: str) -> dict[str, Sequence[int]]:
        """What `Inspection.resources` has of the update and of its prologue."""
        (update,) = self.inspect(dtype, gpu).resources
        _, prologue = self.inspect(dtype, gpu, on_device=True).resources
        return {"update": update, "prologue": prologue}


def selections() -> Iterator[Selection]:
    """Each elementwise algorithm with its defaults and with all switches on, and one with all of one pass beside it."""
    for name in algorithms.__all__:
        cls: type[Optimizer] = getattr(algorithms, name)
        if not cls.elementwise:  # no single kernel
            continue
        everything = {k: True if isinstance(v, Flag) else 0.1 for k, v in switches_of(cls).items()}
        yield Selection(name, cls, {})
        yield Selection(f"{name}-all-switches", cls, everything)
    one_pass = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.999, "master_weights": True}
    yield Selection("AdamW-one-pass", algorithms.AdamW, one_pass, "bf16")


def signatures() -> Iterator[tuple[str, Signature]]:
    """A name and a kernel of each selection."""
    for selection in selections():
        yield selection.name, selection.inspect().signature


def figures(directory: Path, name: str) -> Any:
    return json.loads((directory / f"{name}.json").read_text())


def record(selection: Selection, resources: Mapping[str, Any]) -> str:
    """The text of one record.

    Args:
        resources: of its kernels by dtype, GPU and kernel.
    """
    kernel = selection.inspect()
    used = [
        {"kernel": f"{kind}, {dtype}, {gpu}", "registers": registers, "bytes spilled": spilled, "load bits": bits}
        for dtype, on_gpus in resources.items()
        for gpu, kernels in on_gpus.items()
        for kind, (registers, spilled, bits) in kernels.items()
    ]
    sections = {"FX graph": ("text", kernel.graph)}
    for backend in backends.BACKENDS:
        (source,) = Inspection(replace(kernel.signature, backend=backend.name), portable=True).sources
        sections[backend.name] = (backend.language, source)
    sections["GPUs"] = ("python", selection.inspect(target=GPUS[0]).sources[0])
    _, prologue = selection.inspect(target=GPUS[0], on_device=True).sources
    sections["GPUs, before it: steps are counted on the device"] = ("python", prologue)
    lines = [f"# {kernel.signature.name}", "", "```text", *describe(kernel.cost), "```", "", *_table(used)]
    for title, (language, text) in sections.items():
        lines += ["", f"## {title}", "", f"```{language}", text.strip(), "```"]
    return "\n".join([*lines, ""])


def overview(directory: Path) -> str:
    """The text of the README: a table with a row for each record."""
    resources, measured = figures(directory, "resources"), figures(directory, "measured")
    rows = [_row(s, resources["kernels"][s.name], measured) for s in selections()]
    facts = {
        "triton": resources["triton"],
        "gpus": " / ".join(GPUS),
        "counts": " / ".join(map(str, measured["tensors"])),
    }
    return "\n".join([_INTRODUCTION.format(**facts), *_table(rows), ""])


def _row(selection: Selection, resources: Any, measured: Any) -> dict[str, Any]:
    costs = {dtype: selection.inspect(dtype).cost for dtype in DTYPES}
    updates = {dtype: [resources[dtype][gpu]["update"] for gpu in GPUS] for dtype in DTYPES}
    foreach = measured["foreach"].get(selection.name, {}).values()

    def each(values: Any) -> str:
        return " / ".join(map(str, values)) or "-"

    def any_of(i: int) -> str:
        return each(dict.fromkeys(used[i] for found in updates.values() for used in found))

    return {
        "kernel": f"[{selection.name}]({selection.name}.md)",
        "launches": 1,
        "temporaries": 0,
        **{f"bytes, {d}": f"{c.bytes_per_element} of {c.minimum}" for d, c in costs.items()},
        "operations": sum(costs["fp32"].operations.values()),
        **{f"registers, {d}": each(used[0] for used in found) for d, found in updates.items()},
        "spilled": any_of(1),
        "load bits": any_of(2),
        **{f"error, {d}": measured["error"].get(selection.name, {}).get(d, "-") for d in DTYPES},
        "foreach: launches": each(launches for launches, _ in foreach),
        "seconds": each(seconds for _, seconds in foreach),
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    head = list(rows[0]) if rows else []
    for cells in (head, ["---"] * len(head), *(row.values() for row in rows)):
        yield f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a record of every algorithm, and what its machine code uses.")
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    kernels = {s.name: {d: {gpu: s.resources(d, gpu) for gpu in GPUS} for d in DTYPES} for s in selections()}
    resources = {"triton": triton.version(), "kernels": kernels}
    (directory / "resources.json").write_text(json.dumps(resources, indent=1) + "\n")
    for old in directory.glob("*.md"):
        old.unlink()
    for selection in selections():
        (directory / f"{selection.name}.md").write_text(record(selection, kernels[selection.name]))
    (directory / "README.md").write_text(overview(directory))


if __name__ == "__main__":
    main()
