"""The records in graphs/ are what the code makes now."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest
import torch

from compiled_optim import graphs
from compiled_optim._engine.torch_private import triton, version

DIRECTORY = Path(__file__).parents[2] / "graphs"
RESOURCES = graphs.figures(DIRECTORY, "resources")
SELECTIONS = {s.name: s for s in graphs.selections()}
BUILDS = [(name, dtype, gpu) for name in SELECTIONS for dtype in graphs.DTYPES for gpu in graphs.GPUS]
QUICK = [("AdamW", "fp32", "sm_90"), ("RMSprop-all-switches", "bf16", "sm_80"), ("SGD", "bf16", "sm_100")]

of_this_torch = pytest.mark.skipif(version.torch_version() != (2, 13), reason="the records are those of torch 2.13")


def compare(name: str, current: str) -> None:
    stored = (DIRECTORY / name).read_text()
    lines = difflib.unified_diff(stored.splitlines(), current.splitlines(), f"graphs/{name}", "now", lineterm="")
    assert stored == current, "\n".join(["a record is stale; `make graphs` writes it anew", *lines])


@of_this_torch
@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="the records hold AVX2 kernels, which this machine cannot lower",
)
@pytest.mark.parametrize("name", SELECTIONS)
def test_record_is_current(name: str) -> None:
    compare(f"{name}.md", graphs.record(SELECTIONS[name], RESOURCES["kernels"][name]))


@of_this_torch
def test_table_is_current() -> None:
    compare("README.md", graphs.overview(DIRECTORY))
    assert {file.name for file in DIRECTORY.glob("*.md")} == {"README.md", *(f"{name}.md" for name in SELECTIONS)}


def test_updates_spill_nothing_and_load_128_bits() -> None:
    for name, dtype, gpu in BUILDS:
        _, spilled, bits = RESOURCES["kernels"][name][dtype][gpu]["update"]
        assert (spilled, bits) == (0, 128), f"{name}, {dtype} on {gpu}"
        assert RESOURCES["kernels"][name][dtype][gpu]["prologue"][1] == 0


@of_this_torch
@pytest.mark.skipif(triton.version() != RESOURCES["triton"], reason="another Triton makes other machine code")
@pytest.mark.parametrize(
    ("name", "dtype", "gpu"), [pytest.param(*b, marks=[] if b in QUICK else pytest.mark.slow) for b in BUILDS]
)
def test_machine_code_is_as_recorded(name: str, dtype: str, gpu: str) -> None:
    found = {kind: list(used) for kind, used in SELECTIONS[name].resources(dtype, gpu).items()}
    assert found == RESOURCES["kernels"][name][dtype][gpu], "`make graphs` writes what it is now"
