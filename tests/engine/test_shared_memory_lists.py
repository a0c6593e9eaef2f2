"""Memory that tensors share, in the executions on lists of tensors: one after the other, as torch's loop does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FEW, KINDS, fitted, named, oracle
from torch import Tensor

from compiled_optim import Adam
from compiled_optim._engine.executions.memory import Memory
from compiled_optim.testing import assert_compiles

N = 24
Views = Callable[[Tensor], list[Tensor]]


def same(base: Tensor) -> list[Tensor]:
    return [base, torch.ones(5), base.view(4, 6)]


def partly(base: Tensor) -> list[Tensor]:
    return [base[: N // 2], torch.ones(5), base[N // 4 :], base[N // 3 : N // 2 + 1]]


def neighbours(base: Tensor) -> list[Tensor]:
    return [*base.split(N // 3), torch.ones(5)]


def interleaved(base: Tensor) -> list[Tensor]:
    return [base[::2], base[1::2], base[3:9]]


each_way = pytest.mark.parametrize("views", [same, partly, neighbours, interleaved], ids=lambda f: f.__name__)


class Run:
    """An optimizer of views of one vector, in float64; of which is also what torch carries."""

    def __init__(self, cls: Any, views: Views, **options: Any) -> None:
        torch.set_default_dtype(torch.float64)
        self.params = [torch.nn.Parameter(fitted(cls, v)) for v in views(torch.linspace(1, 2, N))]
        self.optimizer = cls(self.params, **options)
        self.steps = 0

    def give(self) -> None:
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=generator)

    def step(self, count: int = 1, arrange: Callable[[Run], None] = lambda run: None) -> list[Tensor]:
        for _ in range(count):
            self.give()
            arrange(self)
            self.optimizer.step()
        state = [self.optimizer.state.get(p, {}) for p in self.params]
        kept = [v for s in state for v in s.values() if isinstance(v, Tensor)]
        return [t.detach().clone() for t in (*self.params, *kept)]


LOOP = {"foreach": False}


def loop(cls: Any) -> dict[str, Any]:
    return LOOP if "foreach" in cls.rule.declaration.options else {}


def ways(cls: Any) -> list[dict[str, Any]]:
    """Of compiled rules that are elementwise see test_shared_memory."""
    return [{}, *([loop(cls)] if loop(cls) else []), *([] if cls.elementwise else [{"compiled": True}])]


DENSE = [(cls, o, how) for cls, o in FEW if cls in KINDS and cls.accepts_dense for how in ways(cls)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@each_way
@pytest.mark.filterwarnings("ignore::compiled_optim.CompileFallbackWarning")
@pytest.mark.parametrize(("cls", "options", "how"), DENSE, ids=[f"{c.__name__}-{named(o)}-{h}" for c, o, h in DENSE])
def test_parameters(cls: Any, options: dict[str, Any], how: dict[str, Any], views: Views, lenient: None) -> None:
    """Compiled rules that reduce are eager then, and say so."""
    theirs, ours = Run(oracle(cls), views, **options, **loop(cls)), Run(cls, views, **options, **how)
    assert_same(ours.step(3), theirs.step(3))


@each_way
def test_parameters_in_a_compiled_list(views: Views) -> None:
    theirs, ours = Run(torch.optim.Adam, views, foreach=False), Run(Adam, views, compiled="foreach")
    assert_same(ours.step(2), theirs.step(2))


def gradient_is_a_parameter(run: Run) -> None:
    run.params[1].grad = run.params[0].detach()  # which is updated before
    run.params[0].grad = run.params[2].detach()  # and this after


def gradient_is_state(run: Run) -> None:
    run.params[1].grad = run.optimizer.state[run.params[0]]["exp_avg"]
    run.params[0].grad = run.optimizer.state[run.params[2]]["exp_avg_sq"]


def state_is_shared(run: Run) -> None:
    run.optimizer.state[run.params[2]] = run.optimizer.state[run.params[0]]


def state_is_shared_in_views(run: Run) -> None:
    state = run.optimizer.state
    state[run.params[2]] = {k: v[...] for k, v in state[run.params[0]].items()}


@pytest.mark.parametrize("how", [{}, {"foreach": False}, {"compiled": "foreach"}], ids=str)
@pytest.mark.parametrize(
    "arrange",
    [gradient_is_a_parameter, gradient_is_state, state_is_shared, state_is_shared_in_views],
    ids=lambda f: f.__name__,
)
def test_gradients_and_state(arrange: Callable[[Run], None], how: dict[str, Any]) -> None:
    """Also where they come to share memory after a step."""

    def apart(base: Tensor) -> list[Tensor]:
        return [base, base + 1, base + 2]

    theirs, ours = Run(torch.optim.Adam, apart, foreach=False), Run(Adam, apart, **how)
    assert_same(ours.step(), theirs.step())
    assert_same(ours.step(2, arrange), theirs.step(2, arrange))


@each_way
def test_parameters_in_a_loop_of_the_user(views: Views) -> None:
    theirs, ours = Run(torch.optim.Adam, views, foreach=False), Run(Adam, views)
    step = torch.compile(ours.optimizer.step)
    for run, take in ((theirs, theirs.optimizer.step), (ours, step)):
        for _ in range(3):
            run.give()
            take()
    assert_same(ours.params, theirs.params)


def test_parameters_that_come_to_share_memory_in_a_loop_of_the_user() -> None:
    def apart(base: Tensor) -> list[Tensor]:
        return [base, base + 1]

    theirs, ours = Run(torch.optim.Adam, apart, foreach=False), Run(Adam, apart)
    step = torch.compile(ours.optimizer.step)
    for run, take in ((theirs, theirs.optimizer.step), (ours, step)):
        for i in range(5):
            if i == 2:
                run.params[1].data = run.params[0].data
            run.give()
            take()
    assert_same(ours.params, theirs.params)
    with assert_compiles(0):
        ours.give()
        step()


def test_turns() -> None:
    """Tensors that share nothing are one turn; a chain of overlaps is as many turns as it is long."""
    base = torch.zeros(100)
    apart = [[base[:10], torch.ones(1)], [base[10:20]], [torch.ones(3)], [base[20:20]]]
    chain = [[base[:10]], [torch.ones(1), base[5:15]], [base[12:20]], [base[:1]]]
    grads = [torch.ones(1)] * 4
    memory = Memory()
    assert memory.turns(apart, grads) == [0, 0, 0, 0]
    assert memory.turns(chain, grads) == [0, 1, 2, 1]
    assert memory.turns(apart, [*grads[:2], base[15:16], base[0:0]]) == [0, 0, 1, 0]
    assert memory.turns(apart, grads) == [0, 0, 0, 0]
    assert memory.turns([apart[0]] * 3, grads[:3]) == [0, 1, 2]
