"""The records in graphs/ are what the code makes now."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compiled_optim import algorithms
from compiled_optim._engine.torch_private import version
from compiled_optim.graphs import records

DIRECTORY = Path(__file__).parents[2] / "graphs"


@pytest.mark.skipif(version.torch_version() != (2, 13), reason="the records are those of torch 2.13")
@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="the records hold AVX2 kernels, which this machine cannot lower",
)
def test_records_are_current() -> None:
    current = records()
    stored = {f.name: f.read_text() for f in DIRECTORY.iterdir() if f.name.endswith((".fx.txt", ".cpp"))}
    assert stored.keys() == current.keys()
    stale = [name for name, text in current.items() if stored[name] != text]
    assert not stale, f"graphs/ is stale, run `make graphs` and read the difference: {stale}"


@pytest.mark.parametrize("name", algorithms.__all__)
def test_header_states_launches_and_traffic(name: str) -> None:
    declaration = getattr(algorithms, name).rule.declaration
    kept = declaration.kept(declaration.read(declaration.check({})).switches)
    # parameter, each state tensor: read and written; gradient: read; 4 bytes each
    expected = 4 * (3 + 2 * len(kept))
    header = (DIRECTORY / f"{name}.cpp").read_text().splitlines()[0]
    assert header == f"// launches per step: 1, bytes per element: {expected}"
