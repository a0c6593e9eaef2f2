"""The schedules of transformers' `get_scheduler`, on an optimizer of ours and as closed forms of the same names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training import MISSING, Way

pytest.importorskip("transformers", **MISSING)

from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from compiled_optim import lr_scheduler

STEPS, LR = 20, 0.3
BY_METRIC = {"reduce_lr_on_plateau", "greedy"}
# Beside the defaults: options of a kind, with other lengths of the warm-up.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cosine": [{"num_cycles": 1.5}],
    "cosine_with_restarts": [{"num_cycles": 3}],
    "polynomial": [{"power": 2.0, "lr_end": 0.01}],
    "inverse_sqrt": [{"timescale": 9}],
    "cosine_with_min_lr": [{"min_lr": 0.02}, {"min_lr_rate": 0.1, "num_cycles": 0.7}],
    "cosine_warmup_with_min_lr": [{"min_lr_rate": 0.1, "warmup_lr_rate": 0.05}, {"min_lr": 0.03}],
    "warmup_stable_decay": [
        {"num_decay_steps": 6, "warmup_type": w, "decay_type": d, "min_lr_ratio": 0.1}
        for w, d in (("linear", "cosine"), ("cosine", "1-sqrt"), ("1-sqrt", "linear"))
    ],
    "reduce_lr_on_plateau": [{"patience": 1, "factor": 0.5}],
    "greedy": [{"patience": 1, "min_lr": 0.01}],
}
NEEDS = {"cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"}  # options; they have no defaults
KINDS = [str(kind.value) for kind in TYPE_TO_SCHEDULER_FUNCTION]
CASES = [
    pytest.param(kind, options, warmup, id=f"{kind}-{i}-{warmup}")
    for kind in KINDS
    for i, options in enumerate([{}] * (kind not in NEEDS) + OPTIONS.get(kind, []))
    for warmup in (0, 5)
]
CLOSED = [case for case in CASES if case.values[0] not in BY_METRIC]


class Nobody:
    """In the place of a schedule, for the optimizer moves the attached one."""

    def step(self) -> None: ...


def stepped(optimizer: Any, schedule: Any, steps: int, by_metric: bool = False) -> list[float]:
    """The learning rates of the first steps. The metric falls, and then rises."""
    found = []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        schedule.step(*[abs(step - 6.0)] * by_metric)
    return found


def parameter() -> list[Any]:
    return [torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]


def of_transformers(kind: str, optimizer: Any, options: dict[str, Any], warmup: int) -> Any:
    return get_scheduler(kind, optimizer, warmup, STEPS, dict(options))


@pytest.mark.parametrize(("kind", "options", "warmup"), CASES)
@pytest.mark.host("transformers", "every kind of `get_scheduler` on our optimizer")
def test_on_our_optimizer(way: Way, kind: str, options: Any, warmup: int) -> None:
    params, rates = [parameter(), parameter()], []
    for build, given in ((way.of("SGD"), params[0]), (torch.optim.SGD, params[1])):
        optimizer = build(given, lr=LR)
        rates.append(
            stepped(optimizer, of_transformers(kind, optimizer, options, warmup), STEPS + 4, kind in BY_METRIC)
        )
        if given is params[0]:
            way.check(optimizer)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1 or kind.startswith("constant")
    torch.testing.assert_close(params[0][0], params[1][0], rtol=1e-12, atol=1e-14)


def ours(kind: str, optimizer: Any, options: dict[str, Any], warmup: int) -> Any:
    """Our function of the same name and arguments."""
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[kind]
    lengths = {"num_warmup_steps": warmup, "num_training_steps": STEPS}
    taken = function.__code__.co_varnames[: function.__code__.co_argcount]
    return getattr(lr_scheduler, function.__name__)(
        optimizer, **{k: v for k, v in lengths.items() if k in taken}, **options
    )


@pytest.mark.parametrize(("kind", "options", "warmup"), CLOSED)
@pytest.mark.host("transformers", "our schedules of the same names: stepped, as closed forms, attached, resumed")
def test_closed_forms(way: Way, kind: str, options: Any, warmup: int) -> None:
    theirs = torch.optim.SGD(parameter(), lr=LR)
    schedule = of_transformers(kind, theirs, options, warmup)
    expected = stepped(theirs, schedule, STEPS + 4)

    by_hand = way.of("SGD")(parameter(), lr=LR)
    mine = ours(kind, by_hand, options, warmup)
    close = {"rtol": 1e-12, "atol": 1e-15}
    assert stepped(by_hand, mine, STEPS + 4) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert [mine.value(t) for t in range(STEPS + 4)] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    at = torch.arange(STEPS + 4, dtype=torch.float64)
    torch.testing.assert_close(mine.value(at), torch.tensor(expected, dtype=torch.float64), **close)

    attached: Any = way.of("SGD")(parameter(), lr=LR)
    moved = ours(kind, attached, options, warmup)
    attached.attach(moved)
    assert stepped(attached, Nobody(), STEPS + 4) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    way.check(attached)

    half = torch.optim.SGD(parameter(), lr=LR)
    saved = of_transformers(kind, half, options, warmup)
    stepped(half, saved, STEPS // 2)
    resumed = way.of("SGD")(parameter(), lr=LR)
    goes_on = ours(kind, resumed, options, warmup)
    resumed.load_state_dict(half.state_dict())
    goes_on.load_state_dict(saved.state_dict())
    rest = stepped(resumed, goes_on, STEPS // 2)
    assert rest == pytest.approx(expected[STEPS // 2 : 2 * (STEPS // 2)], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("kind", "options", "warmup"), CLOSED)
@pytest.mark.host("transformers", "every kind of `get_scheduler` that needs no metric, attached")
def test_attached(way: Way, kind: str, options: Any, warmup: int) -> None:
    theirs = torch.optim.SGD(parameter(), lr=LR)
    expected = stepped(theirs, of_transformers(kind, theirs, options, warmup), STEPS + 4)
    optimizer: Any = way.of("SGD")(parameter(), lr=LR)
    optimizer.attach(of_transformers(kind, optimizer, options, warmup))
    assert stepped(optimizer, Nobody(), STEPS + 4) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    way.check(optimizer)


@pytest.mark.parametrize("kind", sorted(BY_METRIC))
@pytest.mark.host("transformers", "a kind of `get_scheduler` that needs a metric, attached")
def test_a_metric_cannot_be_attached(way: Way, kind: str) -> None:
    optimizer: Any = way.of("SGD")(parameter(), lr=LR)
    with pytest.raises(TypeError, match=r"ReduceLROnPlateau is not|GreedyLR"):
        optimizer.attach(of_transformers(kind, optimizer, {}, 0))
    way.refused("refused with TypeError")
