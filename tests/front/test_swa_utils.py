"""Averages of weights beside torch.optim.swa_utils."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from averaging import AVERAGES, Net, assert_same_state, change, mix
from torch import Tensor, nn
from torch.optim import swa_utils as stock

import compiled_optim
from compiled_optim import CompileError, CompileFallbackWarning, swa_utils
from compiled_optim.swa_utils import AveragedModel, launcher
from compiled_optim.testing import assert_compiles

average = pytest.mark.parametrize(("theirs", "ours"), AVERAGES.values(), ids=AVERAGES.keys())
use_buffers = pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers too"])
compiled = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def precision(theirs: dict[str, Any]) -> float:
    """With a ``multi_avg_fn`` torch computes the equal average's weight as a float32 tensor."""
    multi = theirs.get("multi_avg_fn")
    return 1e-6 if multi is not None and "swa" in multi.__qualname__ else 1e-12


@compiled
@use_buffers
@average
def test_values(theirs: dict[str, Any], ours: dict[str, Any], use_buffers: bool, compiled: bool) -> None:
    model = Net().double()
    if use_buffers and precision(theirs) > 1e-12:
        theirs = {}  # for torch's raises on integer buffers
    reference = stock.AveragedModel(model, use_buffers=use_buffers, **theirs)
    mine = AveragedModel(model, use_buffers=use_buffers, **ours, compiled=compiled)
    assert isinstance(mine, stock.AveragedModel)
    for _ in range(6):
        change(model)
        reference.update_parameters(model)
        mine.update_parameters(model)
        assert_same_state(mine, reference, 1e-6 if "multi_avg_fn" in ours else 1e-12)
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(mine.eval()(x), reference.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model = nn.ParameterList([torch.randn(s, dtype=dtype) for s in [(3, 5), (), (67,)]])
    exact = nn.ParameterList([p.detach().to(torch.complex128 if dtype.is_complex else torch.float64) for p in model])
    reference, mine = stock.AveragedModel(exact), AveragedModel(model, compiled=True)
    for _ in range(5):
        change(model)
        for p, q in zip(exact, model, strict=True):
            p.data.copy_(q.data)
        reference.update_parameters(exact)
        mine.update_parameters(model)
    rounding = 8 * torch.finfo(dtype).eps
    for p, q in zip(mine.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.detach().to(q.dtype), q.detach(), rtol=rounding, atol=rounding)


def test_one_kernel_for_every_weighted_average() -> None:
    compiled_optim.cache_clear()
    with assert_compiles(1):
        for label, (_, options) in AVERAGES.items():
            if "custom" not in label:
                for model in (Net(), nn.Linear(3, 3), nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))):
                    mine = AveragedModel(model, **options, compiled=True)
                    for _ in range(3):
                        mine.update_parameters(model)


def test_one_plan_for_all_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make_plan = launcher.make_plan
    monkeypatch.setattr(launcher, "make_plan", lambda *args: made.append(1) or make_plan(*args))
    model = Net()
    mine = AveragedModel(model, compiled=True)
    for _ in range(5):
        mine.update_parameters(model)
    assert len(made) == 1


def test_two_functions_of_one_code_are_two_rules() -> None:
    def scaled(factor: float) -> Any:
        return lambda average, model, averaged: average + (model - average) * factor

    for factor in (0.25, 0.5):
        model = nn.Linear(2, 2)
        reference, mine = (
            stock.AveragedModel(model, avg_fn=scaled(factor)),
            AveragedModel(model, avg_fn=scaled(factor), compiled=True),
        )
        for _ in range(3):
            change(model)
            reference.update_parameters(model)
            mine.update_parameters(model)
        assert_same_state(mine, reference, 1e-6)


def test_averages_in_place_without_memory_of_their_size() -> None:
    model = nn.Linear(1 << 10, 1 << 10)
    mine = AveragedModel(model, compiled=True)
    mine.update_parameters(model)
    mine.update_parameters(model)
    before = [(p, p.data_ptr(), p._version) for p in mine.parameters()]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, acc_events=True, activities=activities) as profile:
        mine.update_parameters(model)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()) < 4096
    for p, address, version in before:
        assert p.data_ptr() == address
        assert p._version == version + 1
        assert p.grad is None


@average
def test_checkpoints_both_ways(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    model = Net().double()
    makers: list[Callable[[], nn.Module]] = [
        lambda: stock.AveragedModel(model, **theirs),
        lambda: AveragedModel(model, **ours, compiled=True),
    ]
    uninterrupted = makers[0]()
    saved_by = [make() for make in makers]
    for _ in range(3):
        change(model)
        for m in (uninterrupted, *saved_by):
            m.update_parameters(model)  # type: ignore[operator]
    resumed = [make() for make in makers]
    for before, after in zip(saved_by, reversed(resumed), strict=True):
        after.load_state_dict(before.state_dict())
    for _ in range(3):
        change(model)
        for m in (uninterrupted, *resumed):
            m.update_parameters(model)  # type: ignore[operator]
    for m in resumed:
        assert_same_state(m, uninterrupted, precision(theirs))


def test_copies_and_moves() -> None:
    model = Net().double()
    reference, mine = stock.AveragedModel(model), AveragedModel(model, compiled=True)
    for make in (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to(torch.float64)):
        mine = make(mine)
        mine.module.last.weight = nn.Parameter(mine.module.last.weight.detach().clone())  # replaced under a plan
        for _ in range(2):
            change(model)
            reference.update_parameters(model)
            mine.update_parameters(model)
        assert_same_state(mine, reference)


def test_other_layouts() -> None:
    model = nn.ParameterList(
        [torch.randn(4, 6).t(), torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)]
    )
    reference, mine = stock.AveragedModel(model), AveragedModel(model, compiled=True)
    model[0].data = model[0].data.contiguous()  # the model is laid out otherwise than its average
    for _ in range(3):
        change(model)
        reference.update_parameters(model)
        mine.update_parameters(model)
    assert_same_state(mine, reference, 1e-6)


def in_place(averages: Any, models: Any, averaged: Any) -> None:
    torch._foreach_lerp_(averages, models, 0.3)


def by_place(averages: Any, models: Any, averaged: Any) -> None:
    for i, (average, current) in enumerate(zip(averages, models, strict=True)):
        average.lerp_(current, 0.3 if i < 7 else 0.5)


def by_norm(averages: Any, models: Any, averaged: Any) -> None:
    torch._foreach_lerp_(averages, models, 1 / (1 + torch.stack(torch._foreach_norm(models)).max().item()))


def by_greatest(averages: Any, models: Any, averaged: Any) -> None:
    greatest = torch.cat([m.flatten() for m in models]).max()
    for average, current in zip(averages, models, strict=True):
        average.add_(current / greatest)


def one_by_one(averages: Any, models: Any, averaged: Any) -> None:
    for average, current in zip(averages, models, strict=True):
        average.copy_(torch.where(current > average, average * 0.9 + current * 0.1, average)).mul_(0.5).mul_(2)


@pytest.mark.parametrize("function", [in_place, one_by_one, by_place, by_norm, by_greatest])
def test_a_multi_avg_fn_of_ones_own(function: Any, lenient: None) -> None:
    """It is compiled if each tensor of its lists is averaged alike and for itself, else called as torch calls it."""
    model = Net().double()
    reference = stock.AveragedModel(model, multi_avg_fn=function)
    mine = AveragedModel(model, multi_avg_fn=function, compiled=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            change(model)
            mine.update_parameters(model)
            reference.update_parameters(model)
            assert_same_state(mine, reference)
    assert [w.category for w in caught] == [CompileFallbackWarning] * ("by" in function.__name__.split("_")[0])


@pytest.mark.parametrize(
    "options", [{"multi_avg_fn": by_place}, {"avg_fn": lambda a, m, n: a + (m - a) / m.norm()}], ids=["multi", "norm"]
)
def test_strict_mode_forbids_to_fall_back(options: dict[str, Any]) -> None:
    model = Net()
    mine = AveragedModel(model, **options, compiled=True)
    mine.update_parameters(model)
    change(model)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(CompileError, match=r"averaged eagerly|the average is updated eagerly"):
        mine.update_parameters(model)
    assert_same_state(mine, before, 0)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_optim.cache_clear()
    monkeypatch.setenv("COMPILED_OPTIM_DISABLE", "1")
    model = nn.Linear(3, 3)
    mine = AveragedModel(model, compiled=True)
    with assert_compiles(0):
        for _ in range(3):
            mine.update_parameters(model)


@pytest.mark.parametrize("get", [swa_utils.get_ema_avg_fn, swa_utils.get_ema_multi_avg_fn])
@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_decay_out_of_range(get: Any, decay: float) -> None:
    with pytest.raises(ValueError, match=str(decay)):
        get(decay)


def test_compiled_is_a_bool() -> None:
    with pytest.raises(ValueError, match="compiled must be False or True, got 'foreach'"):
        AveragedModel(nn.Linear(1, 1), compiled="foreach")  # type: ignore[arg-type]


# ---- update_bn


def batches(kind: str) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        x = torch.randn(8, 5, generator=generator)
        yield {"tensor": x, "list": [x, torch.zeros(8)], "tuple": (x,), "dict": {"x": x, "name": "batch"}}[kind]


class TakesDict(Net):
    def forward(self, batch: Any) -> Tensor:
        return super().forward(batch["x"] if isinstance(batch, dict) else batch)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("kind", ["tensor", "list", "tuple", "dict"])
def test_update_bn(kind: str, device: str | None) -> None:
    expected, model = TakesDict(), TakesDict()
    model.load_state_dict(expected.state_dict())
    stock.update_bn(batches("tensor"), expected)
    swa_utils.update_bn(batches(kind), model, device=device)
    assert_same_state(model, expected, 1e-6)
    assert model.norm.momentum == 0.1


# ---- the recipes


@compiled
def test_the_swa_recipe(compiled: bool) -> None:
    """Train, switch to SWA at an epoch, average each epoch from then on, and recompute the statistics."""

    def run(swa: Any, optim: Any, schedulers: Any, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        model = Net()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)
        schedule = schedulers.CosineAnnealingLR(optimizer, T_max=6)
        swa_schedule = swa.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        averaged = swa.AveragedModel(model, **options)
        for epoch in range(10):
            for x in batches("tensor"):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            if epoch > 5:
                averaged.update_parameters(model)
                swa_schedule.step()
            else:
                schedule.step()
        swa.update_bn(batches("tensor"), averaged)
        return averaged

    expected = run(stock, torch.optim, torch.optim.lr_scheduler)
    actual = run(swa_utils, compiled_optim, compiled_optim.lr_scheduler, **({"compiled": True} if compiled else {}))
    assert_same_state(actual, expected, 1e-4)  # float32, over 40 steps


def test_the_ema_recipe_with_a_custom_avg_fn() -> None:
    torch.manual_seed(0)
    model = Net().double()
    reference, mine = stock.AveragedModel(model, avg_fn=mix), AveragedModel(model, avg_fn=mix, compiled=True)
    optimizer = compiled_optim.AdamW(model.parameters(), lr=0.01, compiled=True)
    for x in batches("tensor"):
        optimizer.zero_grad()
        model(x.double()).square().mean().backward()
        optimizer.step()
        reference.update_parameters(model)
        mine.update_parameters(model)
    assert_same_state(mine, reference)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("whose", ["the model", "the average"])
def test_a_tensor_without_memory_is_named(whose: str, compiled: bool) -> None:
    """torch reads and writes where nothing is."""
    model = torch.nn.Linear(8, 8)
    average = swa_utils.AveragedModel(model, compiled=compiled)
    for _ in range(2):
        average.update_parameters(model)
    tensor = model.weight if whose == "the model" else average.module.weight
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"of shape \(8, 8\).* needs .*256 bytes.* has 0"):
        average.update_parameters(model)
    assert average.n_averaged == 2
