"""The signature of the suite: how many kernels exist, and at which step each was compiled."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ALL, CLASSES, IDS

import compiled_optim
from compiled_optim import kernels

SHAPES = [(3, 5), (7,), (), (33, 2)]


def parameters(dtype: torch.dtype = torch.float64, shapes: list[Any] = SHAPES) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def step(optimizer: compiled_optim.Optimizer, *, skip: int | None = None) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        p.grad = None if i == skip else torch.randn_like(p)
    optimizer.step()


def options_of(cls: type[compiled_optim.Optimizer]) -> dict[str, Any]:
    """With momentum where there is such a thing, so that there is state."""
    return {"momentum": 0.9} if "momentum" in cls.declaration.options else {}


@pytest.fixture
def new_kernels() -> Callable[[], int]:
    """How many kernels were loaded since the last call."""
    seen = len(kernels._kernels)

    def count() -> int:
        nonlocal seen
        new, seen = len(kernels._kernels) - seen, len(kernels._kernels)
        return new

    return count


@pytest.mark.parametrize(("cls", "options"), ALL, ids=IDS)
def test_one_kernel_and_only_at_the_first_step(
    cls: type[compiled_optim.Optimizer], options: dict[str, Any], new_kernels: Callable[[], int]
) -> None:
    compiled_optim.cache_clear()
    new_kernels()
    optimizer = cls(parameters(), compiled=True, **options)
    assert new_kernels() == 0  # building an optimizer compiles nothing
    per_step = []
    for _ in range(4):
        step(optimizer)
        per_step.append(len(kernels._kernels))
    assert per_step == [1, 1, 1, 1]
    (row,) = compiled_optim.explain(optimizer)
    assert (row.execution, row.launches, row.tensors) == ("multi_tensor", 1, len(SHAPES))
    assert row.elements == sum(p.numel() for p in optimizer.param_groups[0]["params"])
    info = compiled_optim.cache_info()
    assert info.kernels == info.misses + info.disk_hits == 1


CHANGES: dict[str, Callable[[dict[str, Any], int], None]] = {
    "lr": lambda group, i: group.update(lr=0.1 / (i + 1)),
    "int lr": lambda group, i: group.update(lr=i),
    "lr 0": lambda group, i: group.update(lr=0.0),
    "tensor lr": lambda group, i: group.update(lr=torch.tensor(0.1 / (i + 1))),
    "eps": lambda group, i: group.update(eps=10.0 ** -(i + 3)) if "eps" in group else None,
    "betas": lambda group, i: group.update(betas=(0.1 * i, 0.9)) if "betas" in group else None,
    "momentum": lambda group, i: group.update(momentum=0.5 + 0.1 * i) if "momentum" in group else None,
    "dampening": lambda group, i: group.update(dampening=0.1 * i) if "dampening" in group else None,
    "weight_decay": lambda group, i: group.update(weight_decay=0.1 + 0.1 * i),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cls", CLASSES)
def test_no_value_of_a_hyperparameter_makes_a_kernel(
    cls: type[compiled_optim.Optimizer], change: str, new_kernels: Callable[[], int]
) -> None:
    optimizer = cls(parameters(), weight_decay=0.1, compiled=True, **options_of(cls))
    step(optimizer)
    new_kernels()
    for i in range(4):
        CHANGES[change](optimizer.param_groups[0], i)
        step(optimizer)
    assert new_kernels() == 0


@pytest.mark.parametrize("cls", CLASSES)
def test_weight_decay_from_zero_adds_one_kernel_at_most(
    cls: type[compiled_optim.Optimizer], new_kernels: Callable[[], int]
) -> None:
    optimizer = cls(parameters(), weight_decay=0.0, compiled=True, **options_of(cls))
    step(optimizer)
    new_kernels()
    for value in (0.1, 0.2, 0.0, 0.3):
        optimizer.param_groups[0]["weight_decay"] = value
        step(optimizer)
    assert new_kernels() <= 1


@pytest.mark.parametrize("cls", CLASSES)
def test_life_of_an_optimizer_makes_no_second_kernel(
    cls: type[compiled_optim.Optimizer], new_kernels: Callable[[], int]
) -> None:
    params = parameters()
    optimizer = cls(params, compiled=True, **options_of(cls))
    step(optimizer)
    new_kernels()
    for i in range(8):  # gradients missing in rotation, as in a mixture of experts
        step(optimizer, skip=i % len(params))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer)
    optimizer.add_param_group({"params": parameters(shapes=[(9,), (2, 2)]), "lr": 0.3})
    step(optimizer)
    step(copy.deepcopy(optimizer))
    step(cls(parameters(), compiled=True, **options_of(cls)))  # a second optimizer
    step(cls(parameters(shapes=[(128, 3), (1,)] * 20), compiled=True, **options_of(cls)))  # another model
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(3):
        step(optimizer)
        scheduler.step()
    assert new_kernels() == 0


def test_groups_share_a_launch_unless_a_switch_differs() -> None:
    def groups() -> list[dict[str, Any]]:
        return [{"params": parameters()}, {"params": parameters(), "weight_decay": 0.0, "lr": 0.5}]

    adamw = compiled_optim.AdamW(groups(), compiled=True)
    step(adamw)
    assert [(row.launches, row.tensors) for row in compiled_optim.explain(adamw)] == [(1, 8)]
    adam = compiled_optim.Adam(groups(), weight_decay=0.1, compiled=True)
    step(adam)
    assert sorted((row.launches, row.tensors) for row in compiled_optim.explain(adam)) == [(1, 4), (1, 4)]


def test_one_launch_for_each_dtype(new_kernels: Callable[[], int]) -> None:
    compiled_optim.cache_clear()
    new_kernels()
    params = [p for dtype in (torch.float32, torch.float64, torch.complex128) for p in parameters(dtype)]
    optimizer = compiled_optim.AdamW(params, compiled=True)
    step(optimizer)
    rows = {row.dtype: (row.launches, row.tensors) for row in compiled_optim.explain(optimizer)}
    assert rows == {"float32": (1, 4), "float64": (1, 4), "complex128": (1, 4)}
    assert new_kernels() == 2  # a complex tensor is pairs of reals to the kernel


def test_no_gradients_means_no_kernel_and_no_state(new_kernels: Callable[[], int]) -> None:
    compiled_optim.cache_clear()
    new_kernels()
    optimizer = compiled_optim.Adam(parameters(), compiled=True)
    optimizer.step()
    assert new_kernels() == 0
    assert not optimizer.state
    assert compiled_optim.cache_info().misses == 0


def test_where_a_kernel_came_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPILED_OPTIM_CACHE_DIR", str(tmp_path / "cache"))
    compiled_optim.cache_clear()
    origins = []
    for _ in range(2):
        optimizer = compiled_optim.SGD(parameters(), compiled=True)
        step(optimizer)
        origins.append(compiled_optim.explain(optimizer).rows[0].origin)
    compiled_optim.cache_clear()
    optimizer = compiled_optim.SGD(parameters(), compiled=True)
    step(optimizer)
    origins.append(compiled_optim.explain(optimizer).rows[0].origin)
    assert origins == ["compiled", "memory", "disk"]
    assert compiled_optim.cache_info() == (0, 1, 0, 1)


def test_optimizers_are_freed_when_dropped() -> None:
    optimizer = compiled_optim.AdamW(parameters(), compiled=True)
    step(optimizer)
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None  # by its reference count: nothing of ours points back at it
    finally:
        gc.enable()


def test_a_step_allocates_nothing_of_the_size_of_a_parameter() -> None:
    optimizer = compiled_optim.AdamW([torch.nn.Parameter(torch.zeros(1 << 20))], compiled=True)
    step(optimizer)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated < 4096
