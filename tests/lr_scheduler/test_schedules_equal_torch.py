"""Every scheduler beside torch's: the values that 300 steps set, changed by hand, resumed, and by the closed form."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from schedule_cases import (
    ARGUMENTS,
    CASES,
    OPTIMIZERS,
    STATEFUL,
    STEPS,
    make_optimizer,
    near,
    scheduled,
    step,
    theirs,
)

from compiled_optim import lr_scheduler as ours
from compiled_optim.lr_scheduler.symbolic import t

EVERY = CASES | STATEFUL
every = pytest.mark.parametrize("case", EVERY)
symbolic = pytest.mark.parametrize("case", CASES)


def pair(case: str, kind: str = "torch.SGD", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    stock = kind if kind.startswith("torch.") else f"torch.{kind}"
    return EVERY[case](ours, make_optimizer(kind, dtype)), EVERY[case](theirs, make_optimizer(stock, dtype))


@every
@pytest.mark.parametrize("by_hand", [False, True], ids=["untouched", "by-hand"])
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["float", "tensor"])
def test_steps(case: str, dtype: torch.dtype | None, by_hand: bool) -> None:
    mine, stock = pair(case, dtype=dtype)
    for i in range(STEPS):
        assert scheduled(mine.optimizer) == near(scheduled(stock.optimizer)), f"step {i}"
        assert list(map(float, mine.get_last_lr())) == near(stock.get_last_lr())
        if by_hand and i % 83 == 40:
            for scheduler in (mine, stock):
                group = scheduler.optimizer.param_groups[0]
                group["lr"] = torch.full_like(group["lr"], 0.07) if dtype else 0.07
        step(mine)
        step(stock)
    assert scheduled(mine.optimizer) == near(scheduled(stock.optimizer))


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "torch.SGD"])
def test_steps_of_other_optimizers(kind: str) -> None:
    for case in EVERY:
        mine, stock = pair(case, kind)
        for _ in range(60):
            step(mine)
            step(stock)
            assert scheduled(mine.optimizer) == near(scheduled(stock.optimizer)), case


@symbolic
def test_closed_form(case: str) -> None:
    """On the host, on tensors of steps, and as the expression, it is what torch's steps arrive at."""
    mine, stock = pair(case)
    rows = []
    for _ in range(STEPS):
        rows.append(scheduled(stock.optimizer))
        step(stock)
    steps = torch.arange(STEPS)
    for column, expected in enumerate(map(list, zip(*rows, strict=True))):
        of, group = ("lr", "momentum")[column // 2], column % 2
        if of not in mine.schedules or case == "SequentialLR-OneCycleLR":
            continue
        assert [mine.value(i, group, of) for i in range(0, STEPS, 7)] == near(expected[::7])
        assert type(mine.value(3, group, of)) is float
        for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            values = mine.value(steps.to(dtype), group, of)
            assert values.dtype == dtype
            assert values.tolist() == near(expected, rel)
            assert mine.value(torch.tensor(11.0, dtype=dtype), group, of).shape == ()
        assert mine.value(steps, group, of).dtype == torch.get_default_dtype()
        expression = mine.expression(group, of)
        assert [float(expression.subs(t, i)) for i in (0, 49, 98, 200)] == near([expected[i] for i in (0, 49, 98, 200)])


def resume(module: Any, case: str, saved: tuple[dict[str, Any], dict[str, Any]]) -> Any:
    scheduler = EVERY[case](module, make_optimizer())
    scheduler.optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    return scheduler


@every
def test_resume(case: str) -> None:
    reference, mine = EVERY[case](theirs, make_optimizer()), EVERY[case](ours, make_optimizer())
    for _ in range(137):
        step(reference)
        step(mine)
    saved = [(s.optimizer.state_dict(), s.state_dict()) for s in (reference, mine)]
    assert saved[0][1].keys() == saved[1][1].keys()
    kept = copy.deepcopy(saved[1])
    resumed = [resume(ours, case, s) for s in saved]
    assert saved[1] == kept
    resumed += [resume(theirs, case, s) for s in saved]
    for _ in range(60):
        step(reference)
        for scheduler in resumed:
            step(scheduler)
            assert scheduled(scheduler.optimizer) == near(scheduled(reference.optimizer))


@pytest.mark.parametrize("case", ARGUMENTS)
def test_last_epoch(case: str) -> None:
    """A scheduler made for an optimizer that has been scheduled before."""
    reference = EVERY[case](theirs, make_optimizer())
    for _ in range(98):
        step(reference)
    pairs = []
    for module in (ours, theirs):
        optimizer = make_optimizer()
        optimizer.load_state_dict(reference.optimizer.state_dict())
        cls = type(EVERY[case](module, make_optimizer()))
        pairs.append(cls(optimizer, **ARGUMENTS[case], last_epoch=97))
    if case == "CosineAnnealingWarmRestarts-3":  # torch's does not see that two periods are over
        pairs[1] = reference
    for _ in range(60):
        assert scheduled(pairs[0].optimizer) == near(scheduled(pairs[1].optimizer))
        for scheduler in pairs:
            step(scheduler)


# torch's steps and its closed form contradict each other where total_iters is 0
@pytest.mark.parametrize("case", [case for case in ARGUMENTS if not case.endswith("for-ever")])
def test_a_given_epoch(case: str) -> None:
    """``step(epoch)`` uses the closed form where torch has one, and warns as torch does."""
    schedulers = pair(case)
    warned = 0 if case.startswith("CosineAnnealingWarm") else 1
    for scheduler in schedulers:
        scheduler.optimizer.step()
    for epoch in (3, 50, 49, 98, 120, 2):
        seen = []
        for scheduler in schedulers:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                scheduler.step(epoch)
            seen.append([(w.category, str(w.message), w.filename) for w in caught])
        assert seen[0] == seen[1]
        assert len(seen[0]) == warned
        assert scheduled(schedulers[0].optimizer) == near(scheduled(schedulers[1].optimizer))
        assert schedulers[0].last_epoch == epoch


@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_warm_restarts_at_fractional_epochs(multiple: int) -> None:
    optimizers = [make_optimizer(), make_optimizer()]
    mine, stock = (
        m.CosineAnnealingWarmRestarts(o, 4, multiple, 0.001) for m, o in zip((ours, theirs), optimizers, strict=True)
    )
    for i in range(500):
        for scheduler in (mine, stock):
            scheduler.step(i / 7)
        assert scheduled(optimizers[0]) == near(scheduled(optimizers[1]))
        assert mine.value(i / 7) == near(scheduled(optimizers[1])[0], 1e-11)
        assert (mine.last_epoch, mine.T_i) == (stock.last_epoch, stock.T_i)
