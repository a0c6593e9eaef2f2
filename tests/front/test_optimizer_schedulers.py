"""What drives or wraps an optimizer: schedulers, weight averaging, backward hooks, GradScaler, torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as sched
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from compiled_optim import SGD, AdamW, Optimizer, cache_info, explain

both = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def models(copies: int = 2) -> list[torch.nn.Module]:
    made = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)) for _ in range(copies)]
    for model in made:
        model.double().load_state_dict(made[0].double().state_dict())
    return list(made)


def backward(*lists: torch.nn.Module) -> float:
    x = torch.randn(8, 4, dtype=torch.float64)
    loss = torch.zeros(())
    for model in lists:
        model.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
    return loss.item()


def assert_equal(ours: torch.nn.Module, stock: torch.nn.Module) -> None:
    torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=0, atol=1e-12)


SCHEDULERS: dict[str, Any] = {
    "step": lambda o: sched.StepLR(o, 2, 0.5),
    "one_cycle": lambda o: sched.OneCycleLR(o, max_lr=0.3, total_steps=20),
    "cyclic": lambda o: sched.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "plateau": lambda o: sched.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0),
    "sequential": lambda o: sched.SequentialLR(
        o, [sched.LinearLR(o, 0.1, total_iters=3), sched.CosineAnnealingLR(o, 5)], milestones=[3]
    ),
    "from_zero": lambda o: sched.LambdaLR(o, lambda i: i / 4),
    "chained": lambda o: sched.ChainedScheduler([sched.ConstantLR(o, 0.5, 2), sched.ExponentialLR(o, 0.9)]),
}


@both
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("pair", [(SGD, {"momentum": 0.9}), (AdamW, {})], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, pair: tuple[type[Optimizer], dict[str, Any]], tensor_lr: bool, compiled: bool) -> None:
    cls, options = pair
    ours, stock = models()

    def lr() -> Any:
        return torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1

    mine = cls(ours.parameters(), lr=lr(), compiled=compiled, **options)
    theirs = getattr(torch.optim, cls.__name__)(stock.parameters(), lr=lr(), **options)
    schedulers = [SCHEDULERS[name](mine), SCHEDULERS[name](theirs)]
    given = mine.param_groups[0]["lr"]
    misses = cache_info().misses
    for i in range(10):
        loss = backward(ours, stock)
        for optimizer, scheduler in zip((mine, theirs), schedulers, strict=True):
            optimizer.step()
            scheduler.step(loss) if name == "plateau" else scheduler.step()
        assert_equal(ours, stock)
        assert mine.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
        if i == 0:
            misses = cache_info().misses
    assert cache_info().misses == misses
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    if tensor_lr:
        assert (mine.param_groups[0]["lr"] is given) == isinstance(theirs.param_groups[0]["lr"], torch.Tensor)
    if compiled:
        assert len(explain(mine).rebuilt) == 1


@both
def test_one_cycle_moves_betas_and_momentum(compiled: bool) -> None:
    for cls, option, options in ((AdamW, "betas", {}), (SGD, "momentum", {"momentum": 0.9})):
        model = models(1)[0]
        optimizer = cls(model.parameters(), compiled=compiled, **options)
        scheduler = sched.OneCycleLR(optimizer, max_lr=0.3, total_steps=6)
        values = set()
        for _ in range(5):
            backward(model)
            optimizer.step()
            scheduler.step()
            values.add(optimizer.param_groups[0][option])
        assert len(values) > 2


@both
def test_a_scheduler_counts_steps(compiled: bool) -> None:
    """It replaces ``step`` on the instance, and warns when it is called first."""
    model = models(1)[0]
    optimizer = AdamW(model.parameters(), compiled=compiled)
    scheduler = sched.StepLR(optimizer, 1)
    with pytest.raises(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()
    optimizer = AdamW(model.parameters(), compiled=compiled)
    scheduler = sched.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        backward(model)
        optimizer.step()
        scheduler.step()
    assert optimizer._opt_called
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 8)
    other = sched.StepLR(optimizer, 1)
    other.load_state_dict(scheduler.state_dict())
    assert other.last_epoch == 3


@both
def test_weight_averaging(compiled: bool) -> None:
    ours, stock = models()
    mine = SGD(ours.parameters(), lr=0.1, compiled=compiled)
    theirs = torch.optim.SGD(stock.parameters(), lr=0.1)
    averages = []
    for average in (None, get_ema_multi_avg_fn(0.9)):
        averages.append([AveragedModel(m, multi_avg_fn=average) for m in (ours, stock)])
    schedulers = [SWALR(o, swa_lr=0.01, anneal_epochs=2) for o in (mine, theirs)]
    for _ in range(4):
        backward(ours, stock)
        mine.step()
        theirs.step()
        for pair in averages:
            pair[0].update_parameters(ours)
            pair[1].update_parameters(stock)
        for scheduler in schedulers:
            scheduler.step()
    for pair in averages:
        assert_equal(*pair)
    with pytest.raises(AssertionError):
        assert_equal(averages[0][0].module, ours)


@both
def test_an_optimizer_for_each_parameter_in_backward_hooks(compiled: bool) -> None:
    ours, stock = models()
    mine = {p: AdamW([p], lr=0.1, compiled=compiled) for p in ours.parameters()}
    theirs = torch.optim.AdamW(stock.parameters(), lr=0.1)

    def hook(p: torch.Tensor) -> None:
        mine[p].step()
        mine[p].zero_grad()

    for p in ours.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        backward(stock, ours)
        theirs.step()
        assert_equal(ours, stock)
        assert all(p.grad is None for p in ours.parameters())
    expected = {"multi_tensor"} if compiled else {"eager"}
    assert all({row.execution for row in explain(o)} == expected for o in mine.values())


# ---- torch.amp.GradScaler


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return torch.utils._pytree.tree_map(
        lambda t: t.clone() if isinstance(t, torch.Tensor) else t, (model.state_dict(), optimizer.state_dict()["state"])
    )


@pytest.mark.parametrize("options", [{}, {"compiled": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("cls", [AdamW, SGD])
def test_grad_scaler(cls: type[Optimizer], options: dict[str, Any]) -> None:
    ours, stock = models()
    fused = "fused" in options
    extra: dict[str, Any] = {"momentum": 0.9} if cls is SGD else {}
    mine = cls(ours.parameters(), lr=0.1, **extra, **options)
    # not fused: torch's fused SGD keeps an uninitialised momentum buffer if its first step is skipped
    theirs = getattr(torch.optim, cls.__name__)(stock.parameters(), lr=0.1, **extra)
    assert hasattr(mine, "_step_supports_amp_scaling") == fused
    assert not hasattr(theirs, "_step_supports_amp_scaling")
    scalers = [scaler(), scaler()]
    before = snapshot(ours, mine)
    for i in range(6):
        x = torch.randn(8, 4, dtype=torch.float64)
        for model, optimizer, s in ((ours, mine, scalers[0]), (stock, theirs, scalers[1])):
            optimizer.zero_grad()
            s.scale(model(x).square().mean()).backward()
            if i in (0, 3):
                next(model.parameters()).grad[0, 0] = torch.inf
            if i == 4:  # unscaled by the user, to clip
                s.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        if i in (0, 3):
            before = snapshot(ours, mine)
        for optimizer, s in ((mine, scalers[0]), (theirs, scalers[1])):
            s.step(optimizer)
            s.update()
        if i in (0, 3):
            torch.testing.assert_close(snapshot(ours, mine), before, rtol=0, atol=0)
        assert_equal(ours, stock)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert not hasattr(mine, "grad_scale")  # GradScaler multiplies its scale by one that is there
    if cls is AdamW:
        assert {int(s["step"]) for s in mine.state.values()} == {4}
    if options:
        assert {row.execution for row in explain(mine)} == {"multi_tensor"}


def test_scale_and_found_inf_may_each_be_missing() -> None:
    """As torch's fused optimizers take them."""
    ours, stock = models()
    pair: list[Any] = [
        AdamW(ours.parameters(), fused=True, compiled=True),
        torch.optim.AdamW(stock.parameters(), fused=True),
    ]
    for scale, found in ((None, 0.0), (8.0, None), (8.0, 0.0), (None, 1.0), (8.0, 1.0)):
        backward(ours, stock)
        for optimizer in pair:
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            optimizer.found_inf = None if found is None else torch.tensor(found)
            optimizer.step()
        assert_equal(ours, stock)
    assert {int(s["step"]) for s in pair[0].state.values()} == {3}


# ---- torch.compile around us


@pytest.fixture
def _dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        # torch's own: on its first import of Dynamo, and when a graph breaks after backward()
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield
    torch.compiler.reset()


@both
@pytest.mark.usefixtures("_dynamo")
def test_a_compiled_forward_with_our_step_outside(compiled: bool) -> None:
    ours, stock = models()
    mine = AdamW(ours.parameters(), lr=0.1, compiled=compiled)
    theirs = torch.optim.AdamW(stock.parameters(), lr=0.1)
    forward = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(8, 4, dtype=torch.float64)
        for model, optimizer in ((forward, mine), (stock, theirs)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert_equal(ours, stock)
    assert {row.execution for row in explain(mine)} == {"multi_tensor" if compiled else "eager"}


@both
@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "tensor"])
def test_a_step_inside_a_compiled_function(compiled: bool, lr: Any) -> None:
    ours, stock = models()
    mine = AdamW(ours.parameters(), lr=lr, compiled=compiled)
    theirs = torch.optim.AdamW(stock.parameters(), lr=float(lr))

    @torch.compile(backend="aot_eager")
    def train(x: torch.Tensor) -> torch.Tensor:
        mine.zero_grad()
        loss = ours(x).square().mean()
        loss.backward()
        mine.step()
        return loss.detach()

    for i in range(4):
        x = torch.randn(8, 4, dtype=torch.float64)
        if i == 2:  # a new learning rate on the way
            theirs.param_groups[0]["lr"] = 0.3
            if isinstance(lr, torch.Tensor):
                lr.fill_(0.3)
            else:
                mine.param_groups[0]["lr"] = 0.3
        loss = stock(x).square().mean()
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        torch.testing.assert_close(train(x), loss.detach())
        assert_equal(ours, stock)
    assert {row.execution for row in explain(mine)} == {"multi_tensor" if compiled else "eager"}
