"""What two processes have made of each feature of torch.distributed, and a checkpoint that goes on in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training import MISSING, WAYS, Way, assert_same

pytest.importorskip("lightning", **MISSING)  # these need no framework, but the time of make test-hosts

import torch.distributed.checkpoint as dcp
from process import FEATURES, KERNELS, LR, Builder, sharded, train, whole
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes, which share a cache that was empty, have written outcomes and checkpoints."""
    found = tmp_path_factory.mktemp("two")
    (found / "cache").mkdir(mode=0o700)
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "COMPILED_OPTIM_CACHE_DIR": str(found / "cache")}
    processes = []
    for rank in range(2):
        with (found / f"log{rank}").open("w") as log:
            command = [sys.executable, str(HERE / "process.py"), str(rank), str(found)]
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join((found / f"log{rank}").read_text() for rank in range(2))
    return found


@pytest.fixture(scope="module")
def outcomes(directory: Path) -> list[dict[str, Any]]:
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


def row(name: str) -> Any:
    host, feature = name.split(": ", 1)
    return pytest.param(name, marks=pytest.mark.host(host, feature), id=name)


@pytest.mark.parametrize("name", [row(name) for name in FEATURES])
def test_two_processes(way: Way, outcomes: list[Any], name: str) -> None:
    problems = [found[name][way.name][0] for found in outcomes]
    assert problems == ["", ""], "\n".join(problems)
    way.seen |= {found[name][way.name][1] for found in outcomes} - {""}  # one of them may have no part in the step
    assert way.seen == {WAYS[way.name]}


@pytest.mark.parametrize("name", [row(KERNELS)])
def test_processes_share_kernels(outcomes: list[Any], name: str, record_property: Any) -> None:
    assert [found[name]["compiled"][0] for found in outcomes] == ["", ""]
    record_property("ran", "multi_tensor")
    record_property("result", "")


@pytest.mark.host("Distributed checkpoint", "of two processes in one: ours, torch's by ours and ours by torch's")
def test_a_checkpoint_goes_on_in_one_process(way: Way, directory: Path, mesh: Any) -> None:
    def resumed(saved: str, builder: Builder) -> Any:
        model = sharded(mesh)
        optimizer = builder(model.parameters(), lr=LR)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=directory / saved)
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        train(model, optimizer, start=6, steps=3)
        return whole(model), optimizer

    mine, theirs = Builder(way, directory), Builder(None, directory)
    stock, _ = resumed("torch", theirs)
    for saved, builder in ((way.name, mine), ("torch", mine), (way.name, theirs)):
        model, optimizer = resumed(saved, builder)
        assert_same(model, stock, 1e-12)
        if builder is mine:
            way.check(optimizer)


@pytest.mark.host("FSDP2", "Adafactor and Muon, which reduce over whole matrices")
def test_rules_that_reduce(way: Way, mesh: Any) -> None:
    for name in ("Adafactor", "Muon"):
        model = sharded(mesh)
        matrices = [p for p in model.parameters() if p.dim() == 2]
        before = whole(model)
        optimizer = way.of(name)(matrices, lr=LR)
        with pytest.raises(RuntimeError, match=f"{name} does not support DTensor parameters.*not elementwise"):
            train(model, optimizer, steps=1)
        assert_same(whole(model), before, 0)
        assert not optimizer.state
    way.refused("refused with RuntimeError")
