"""The files that earlier versions wrote still load, and training continues as it did there.

`golden_files.py` wrote them. A pickle names each class by its module, so a test here fails when a class moves. The old
module must then stay importable and still provide the class.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import golden_files as golden
import pytest
import torch
from torch import Tensor

import compiled_optim
from compiled_optim import lr_scheduler

ARCHIVES = sorted((Path(__file__).parents[1] / "golden").glob("*.zip"))
MEMBERS = [(path, Path(name).stem, Path(name).suffix) for path in ARCHIVES for name in zipfile.ZipFile(path).namelist()]


def of(cases: Any, kind: str) -> pytest.MarkDecorator:
    """Parametrizes a test with the cases that every archive holds as ``kind``, "saved" or "pickled"."""
    found = [(path, name) for path, name, suffix in MEMBERS if name in cases and suffix == f".{kind}"]
    return pytest.mark.parametrize(("path", "name"), found, ids=[f"{path.stem}-{name}" for path, name in found])


def load(path: Path, name: str, kind: str) -> Any:
    data = zipfile.ZipFile(path).read(f"{name}.{kind}")
    return torch.load(io.BytesIO(data), weights_only=kind == "saved")


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def layout(state_dict: dict[str, Any]) -> Any:
    """The names of the state with the shape and dtype of each tensor, and the param groups.

    Lists are not looked into: L-BFGS appends to them in every iteration.
    """

    def kind(value: Any) -> Any:
        return (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)

    states = {i: {k: kind(v) for k, v in state.items()} for i, state in state_dict["state"].items()}
    return states, state_dict["param_groups"]


def test_every_case_is_there() -> None:
    """A new optimizer or schedule is written to a new archive."""
    assert {name for _, name, _ in MEMBERS} == {name for name, _ in golden.CASES}
    classes = {cls for cls, _ in golden.OPTIMIZERS.values()}
    assert classes == {*compiled_optim.algorithms.__all__, "LBFGS"}
    schedules = {name.split("-")[0] for name in golden.SCHEDULES}
    public = {name for name in lr_scheduler.__all__ if isinstance(getattr(lr_scheduler, name), type)}
    assert schedules == public - {"LRScheduler"}


@of(golden.OPTIMIZERS, "saved")
def test_a_state_dict_of_an_optimizer(path: Path, name: str) -> None:
    cls, options = golden.OPTIMIZERS[name]
    saved = load(path, name, "saved")
    params = [torch.nn.Parameter(p) for p in saved["params"]]
    chosen = {k: v for k, v in options.items() if k in ("compiled", "fused")}  # the checkpoint holds the others
    optimizer = getattr(compiled_optim, cls)(golden.groups(cls, params), **chosen)
    optimizer.load_state_dict(saved["state_dict"])
    golden.train(optimizer, golden.MORE)
    assert_close([p.detach() for p in params], saved["after"])
    assert layout(optimizer.state_dict()) == layout(saved["state_dict"])


@of(golden.OPTIMIZERS, "pickled")
def test_a_pickled_optimizer(path: Path, name: str) -> None:
    cls, options = golden.OPTIMIZERS[name]
    optimizer, saved = load(path, name, "pickled")["optimizer"], load(path, name, "saved")
    assert type(optimizer) is getattr(compiled_optim, cls)
    golden.train(optimizer, golden.MORE)
    assert_close([p.detach() for group in optimizer.param_groups for p in group["params"]], saved["after"])
    runs_eagerly = {row.execution for row in compiled_optim.explain(optimizer)} == {"eager"}
    assert runs_eagerly != bool(options.get("compiled") or options.get("fused"))


@of(golden.SCHEDULES, "saved")
def test_a_state_dict_of_a_schedule(path: Path, name: str) -> None:
    saved = load(path, name, "saved")
    optimizer = golden.scheduled_optimizer()
    scheduler = golden.SCHEDULES[name](optimizer)
    if name.endswith("attached"):
        optimizer.attach(scheduler)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    assert_close(golden.follow(scheduler, golden.STEPS_OF_SCHEDULES), saved["after"])
    assert list(scheduler.state_dict()) == list(saved["scheduler"])


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step:UserWarning")  # torch counts no steps of a copy
@of(golden.SCHEDULES, "pickled")
def test_a_pickled_schedule(path: Path, name: str) -> None:
    """Its optimizer is pickled with it. An attached schedule comes back detached and is stepped by hand."""
    pickled, saved = load(path, name, "pickled"), load(path, name, "saved")
    scheduler = pickled["scheduler"]
    assert type(scheduler) is getattr(compiled_optim.lr_scheduler, name.split("-")[0])
    assert scheduler.optimizer is pickled["optimizer"]
    assert_close(golden.follow(scheduler, golden.STEPS_OF_SCHEDULES), saved["after"])


@of(golden.AVERAGED, "saved")
def test_a_state_dict_of_an_average(path: Path, name: str) -> None:
    saved = load(path, name, "saved")
    averaged = golden.new_average(name)
    averaged.load_state_dict(saved["state_dict"])
    golden.average(averaged, range(2, 2 + golden.MORE))
    assert_close(averaged.state_dict(), saved["after"])


@of(golden.AVERAGED, "pickled")
def test_a_pickled_average(path: Path, name: str) -> None:
    averaged, saved = load(path, name, "pickled")["averaged"], load(path, name, "saved")
    assert averaged.compiled == name.endswith("compiled")
    golden.average(averaged, range(2, 2 + golden.MORE))
    assert_close(averaged.state_dict(), saved["after"])
