"""Two processes that train together: uneven and empty shards, misplaced gradients, checkpoints for one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch.distributed.tensor", reason="this torch was built without torch.distributed")

import torch.distributed.checkpoint as dcp
from sharded import STEPS, Pair
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import compiled_optim

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes, whose own checks have passed, have saved their shards."""
    directory = tmp_path_factory.mktemp("two")
    logs = [directory / f"log{rank}" for rank in (0, 1)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [sys.executable, "-W", "error", str(HERE / "worker.py"), str(rank), str(directory)]
            processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ}))
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    return directory


Build = Callable[[Any], torch.optim.Optimizer]


def ours(**options: Any) -> Build:
    return lambda params: compiled_optim.AdamW(params, lr=0.1, **options)


def stock(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1)


@pytest.mark.parametrize(
    ("saved", "build"),
    [
        ("eager", ours(compiled=True)),
        ("loop", ours()),
        ("compiled", ours(compiled=True)),
        ("torch", ours(compiled=True)),
        ("torch", ours()),
        ("compiled", stock),
        ("eager", stock),
    ],
    ids=[
        "eager-compiled",
        "loop-eager",
        "compiled-compiled",
        "torch-compiled",
        "torch-eager",
        "compiled-torch",
        "eager-torch",
    ],
)
def test_a_checkpoint_of_two_processes_goes_on_in_one(checkpoints: Path, mesh: Any, saved: str, build: Build) -> None:
    straight, resumed = Pair(mesh, stock, stock), Pair(mesh, build, stock)
    straight.step(range(STEPS), clip=0.01)
    resumed.plain, resumed.optimizers = straight.plain, (resumed.optimizers[0], straight.optimizers[1])
    before = [p.full_tensor().detach().clone() for p in resumed.model.parameters()]
    model, optimizer = get_state_dict(resumed.model, resumed.optimizers[0])  # by a step with gradients of zero
    assert [torch.equal(p.full_tensor(), q) for p, q in zip(resumed.model.parameters(), before, strict=True)] == [
        True
    ] * 6
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=checkpoints / saved)
    set_state_dict(resumed.model, resumed.optimizers[0], model_state_dict=model, optim_state_dict=optimizer)
    resumed.compare()
    resumed.step(range(STEPS, 2 * STEPS), clip=0.01)
    resumed.compare()
