"""The signature of the suite: how many kernels exist, and at which step each was compiled."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    ALL,
    ELEMENTWISE,
    NARROW,
    gradient,
    named,
    numbers_of,
    rich_options,
    sample,
    switch_sets,
)

import compiled_optim
from compiled_optim.testing import assert_compiles

SHAPES = [(3, 5), (7,), (), (33, 2)]
KERNELS = [(cls, options) for cls, options in ALL if cls in ELEMENTWISE]
each_class = pytest.mark.parametrize("cls", ELEMENTWISE, ids=lambda cls: cls.__name__)


def parameters(dtype: torch.dtype = torch.float64, shapes: list[Any] = SHAPES) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def step(optimizer: compiled_optim.Optimizer, *, skip: int | None = None) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        p.grad = None if i == skip else gradient(type(optimizer), p)
    optimizer.step()


@each_class
def test_every_kernel_at_once(cls: type[compiled_optim.Optimizer]) -> None:
    """One for each combination of switches and each dtype, compiled side by side: the first, for it saves minutes."""
    compiled_optim.cache_clear()
    wanted = [(options, torch.float64) for options in switch_sets(cls)]
    narrow = [options for c, options in NARROW if c is cls]
    wanted += [(options, dtype) for options in narrow for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    optimizer = cls([{"params": parameters(dtype), **options} for options, dtype in wanted], compiled=True)
    with assert_compiles(len(wanted)):
        step(optimizer)
    with assert_compiles(0):
        step(optimizer)
    assert [(row.launches, row.tensors) for row in compiled_optim.explain(optimizer)] == [(1, 4)] * len(wanted)


@pytest.mark.parametrize(("cls", "options"), KERNELS, ids=[f"{c.__name__}-{named(o)}" for c, o in KERNELS])
def test_one_kernel_and_only_at_the_first_step(cls: type[compiled_optim.Optimizer], options: dict[str, Any]) -> None:
    compiled_optim.cache_clear()
    with assert_compiles(0):  # building an optimizer compiles nothing
        optimizer = cls(parameters(), compiled=True, **options)
    for expected in (1, 0, 0, 0):
        with assert_compiles(expected):
            step(optimizer)
    (row,) = compiled_optim.explain(optimizer)
    assert (row.execution, row.launches, row.tensors) == ("multi_tensor", 1, len(SHAPES))
    assert row.elements == sum(p.numel() for p in optimizer.param_groups[0]["params"])
    info = compiled_optim.cache_info()
    assert info.kernels == info.misses + info.disk_hits == 1


@each_class
def test_no_value_of_a_hyperparameter_makes_a_kernel(cls: type[compiled_optim.Optimizer]) -> None:
    optimizer = cls(parameters(), compiled=True, **rich_options(cls))
    step(optimizer)
    values = {k: [sample(k, field, fraction) for fraction in (0.2, 0.4, 0.7)] for k, field in numbers_of(cls).items()}
    values["lr"] += [0.0, 0, 1, torch.tensor(0.1)]
    for name, several in values.items():
        for value in several:
            optimizer.param_groups[0][name] = value
            with assert_compiles(0):
                step(optimizer)


@pytest.mark.parametrize(
    ("cls", "switch"),
    [(cls, name) for cls in ELEMENTWISE for name, field in numbers_of(cls).items() if field.switch],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_number_from_zero_adds_one_kernel_at_most(cls: type[compiled_optim.Optimizer], switch: str) -> None:
    optimizer = cls(parameters(), compiled=True)
    step(optimizer)
    with assert_compiles() as compiled:
        for value in (0.1, 0.2, 0.0, 0.3):
            optimizer.param_groups[0][switch] = value
            step(optimizer)
    assert compiled.kernels <= 1


@each_class
def test_life_of_an_optimizer_makes_no_second_kernel(cls: type[compiled_optim.Optimizer]) -> None:
    options = rich_options(cls)  # so that there is all the state there can be
    params = parameters()
    optimizer = cls(params, compiled=True, **options)
    step(optimizer)
    with assert_compiles(0):
        for i in range(8):  # gradients missing in rotation, as in a mixture of experts
            step(optimizer, skip=i % len(params))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(optimizer)
        optimizer.add_param_group({"params": parameters(shapes=[(9,), (2, 2)]), "lr": 0.3})
        step(optimizer)
        step(copy.deepcopy(optimizer))
        step(cls(parameters(), compiled=True, **options))  # a second optimizer
        step(cls(parameters(shapes=[(128, 3), (1,)] * 20), compiled=True, **options))  # another model
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(3):
            step(optimizer)
            scheduler.step()


def test_groups_share_a_launch_unless_a_switch_differs() -> None:
    def groups() -> list[dict[str, Any]]:
        return [{"params": parameters()}, {"params": parameters(), "weight_decay": 0.0, "lr": 0.5}]

    adamw = compiled_optim.AdamW(groups(), compiled=True)
    step(adamw)
    assert [(row.launches, row.tensors) for row in compiled_optim.explain(adamw)] == [(1, 8)]
    adam = compiled_optim.Adam(groups(), weight_decay=0.1, compiled=True)
    step(adam)
    assert sorted((row.launches, row.tensors) for row in compiled_optim.explain(adam)) == [(1, 4), (1, 4)]


def test_one_launch_for_each_dtype() -> None:
    compiled_optim.cache_clear()
    params = [p for dtype in (torch.float32, torch.float64, torch.complex128) for p in parameters(dtype)]
    optimizer = compiled_optim.AdamW(params, compiled=True)
    with assert_compiles(2):  # a complex tensor is pairs of reals to the kernel
        step(optimizer)
    rows = {row.dtype: (row.launches, row.tensors) for row in compiled_optim.explain(optimizer)}
    assert rows == {"float32": (1, 4), "float64": (1, 4), "complex128": (1, 4)}


def test_no_gradients_means_no_kernel_and_no_state() -> None:
    compiled_optim.cache_clear()
    optimizer = compiled_optim.Adam(parameters(), compiled=True)
    with assert_compiles(0):
        optimizer.step()
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
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities, acc_events=True) as profile:
        optimizer.step()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated < 4096
