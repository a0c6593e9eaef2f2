"""A step that raises has changed nothing, in every execution: parameters, moments, counts, and which state there is."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import assert_equal, both, parameters, set_gradients, train
from cases import CLASSES, rich_options
from frozen import assert_frozen, frozen
from torch import Tensor

from compiled_optim import SGD, Adam, AdamW, Optimizer
from compiled_optim._engine.executions import lists
from compiled_optim._engine.executions.launch import Plan
from compiled_optim.declare import buffer, number

EXECUTIONS: list[dict[str, Any]] = [{}, {"foreach": False}, {"compiled": True}, {"compiled": "foreach"}]
every_execution = pytest.mark.parametrize("how", EXECUTIONS, ids=lambda how: str(how or "eager"))
lenient = pytest.mark.usefixtures("lenient")


def assert_raises_and_keeps(optimizer: Any, params: list[Any], error: Any, match: str) -> None:
    """Twice, for the first attempt may leave a plan."""
    before = frozen(optimizer, params)
    for _ in range(2):
        with pytest.raises(error, match=match):
            optimizer.step()
        assert_frozen(optimizer, params, before)


# ---- state that does not fit

MISFITS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "other shape": (lambda t: t.new_ones(7), r"must have its shape, got \(7,\)"),
    "transposed": (lambda t: t.mT, r"must have its shape, got \(2, 5\)"),
    "broadcast": (lambda t: t.new_ones(1), r"must have its shape, got \(1,\)"),
    "scalar": (lambda t: t.new_ones(()), r"must have its shape, got \(\)"),
    "empty": (lambda t: t.new_ones(0), r"must have its shape, got \(0,\)"),
    "integers": (lambda t: t.long(), "must be of a real floating-point dtype, got .*int64"),
    "complex": (lambda t: t.to(torch.complex128), "must be of a real floating-point dtype, got .*complex128"),
    "expanded": (lambda t: t[:1, :1].expand(t.shape), "must not have elements that share a single memory"),
    "elsewhere": (lambda t: t.to("meta"), "must be on cpu, got .*meta"),
    "sparse": (lambda t: t.to_sparse(), "must be dense, got a sparse_coo tensor"),
    "a number": (lambda t: 1.0, "must be a tensor, got 1.0 of type float"),
    "text": (lambda t: "x", "must be a tensor, got 'x' of type str"),
}


EACH_ONCE = [(cls, how) for cls in CLASSES if cls.accepts_dense for how in EXECUTIONS[:3]
             if how.keys() <= inspect.signature(cls).parameters.keys()] + [(AdamW, EXECUTIONS[3])]  # fmt: skip


@pytest.mark.parametrize(("cls", "how"), EACH_ONCE, ids=str)
def test_state_of_another_shape(cls: Any, how: dict[str, Any]) -> None:
    """As when a checkpoint lists the parameters in another order. The others are not updated either."""
    params = parameters()
    optimizer = cls(params, **rich_options(cls), **how)
    train(2, (optimizer, params))
    for name in cls.rule.declaration.kept(optimizer._work().read()[0].switches, torch.float32, params[1].dim()):
        right = optimizer.state[params[1]][name]
        optimizer.state[params[1]][name] = right.new_ones(3, 4)
        named = f"{cls.__name__}: state '{name}' of the parameter of shape \\(5, 2\\) at index 1 of param group 0 must"
        message = f"{named} have (its shape|the shape {re.escape(str(tuple(right.shape)))}), got \\(3, 4\\)"
        assert_raises_and_keeps(optimizer, params, RuntimeError, message)
        optimizer.state[params[1]][name] = right
    train(1, (optimizer, params))


@both
def test_a_parameter_that_becomes_lazily_conjugated(compiled: bool) -> None:
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.complex128)) for _ in range(2)]
    optimizer = SGD(params, compiled=compiled)
    train(2, (optimizer, params))
    params[1].data = params[1].data.conj()
    set_gradients(params)
    assert_raises_and_keeps(optimizer, params, RuntimeError, "must not be lazily conjugated, use its resolve_conj")


@both
@pytest.mark.parametrize(("misfit", "message"), MISFITS.values(), ids=MISFITS)
def test_state_that_does_not_fit(misfit: Callable[[Tensor], Any], message: str, compiled: bool) -> None:
    params = parameters()
    optimizer = Adam(params, compiled=compiled)
    train(2, (optimizer, params))
    right = optimizer.state[params[1]]["exp_avg_sq"]
    optimizer.state[params[1]]["exp_avg_sq"] = misfit(right)
    with pytest.raises(RuntimeError, match=f"Adam: state 'exp_avg_sq' .*index 1 of param group 0 {message}"):
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 2, 2]
    optimizer.state[params[1]]["exp_avg_sq"] = right
    train(1, (optimizer, params))
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 3, 3]


@every_execution
def test_a_gradient_of_another_shape(how: dict[str, Any]) -> None:
    """Nothing but the shapes tells of it, when the data of a parameter was replaced."""
    params = parameters()
    optimizer = SGD(params, **how)
    set_gradients(params)
    params[1].data = torch.ones(2, 5, dtype=torch.float64)
    assert_raises_and_keeps(optimizer, params, RuntimeError, r"gradient .*\(2, 5\) at index 1 .* got \(5, 2\)")


# ---- one part of a step after the other


def sparse_row(index: int) -> Tensor:
    return torch.sparse_coo_tensor([[index]], torch.ones(1, 2, dtype=torch.float64), (5, 2), check_invariants=False)


@lenient
@pytest.mark.filterwarnings("ignore::compiled_optim.CompileFallbackWarning")
@every_execution
def test_an_index_out_of_range_in_the_part_that_is_not_compiled(how: dict[str, Any]) -> None:
    params = parameters()
    optimizer = SGD(params, momentum=0.9, **how)
    for _ in range(3):
        set_gradients(params)
        params[1].grad = sparse_row(1)
        optimizer.step()
    params[1].grad = sparse_row(99)
    assert_raises_and_keeps(optimizer, params, RuntimeError, "size is inconsistent with|out of range|must be less")
    params[1].grad = sparse_row(1)
    optimizer.step()


@lenient
@pytest.mark.filterwarnings("ignore::compiled_optim.CompileFallbackWarning")
def test_a_count_that_is_none_in_the_part_that_is_not_compiled() -> None:
    params = parameters()
    params[1].data = torch.zeros(5, 4, dtype=torch.float64)[:, ::2]  # which no kernel takes
    optimizer = Adam(params, compiled=True)
    train(2, (optimizer, params))
    optimizer.state[params[1]]["step"] = "x"
    with pytest.raises(TypeError, match=r"Adam: state 'step' .*index 1 of param group 0 must be a number .*got 'x'"):
        optimizer.step()
    assert [optimizer.state[p]["step"] for p in (params[0], params[2])] == [2, 2]


class Falters(Optimizer):
    """Momentum, and a rule and scalars that raise when told to."""

    lr: float = number(default=0.1)
    fails: float = number(default=0.0)
    average = buffer()
    rule_fails = False

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        if h.fails:
            raise ArithmeticError("planted in scalars")
        return {"lr": h.lr, "first": 1.0 if step == 1 else 0.0}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        if Falters.rule_fails:
            raise ArithmeticError("planted in update")
        s.average = s.average * 0.9 + g + g * k.first
        return p - s.average * k.lr


@pytest.mark.parametrize(
    ("how", "trained"), [*((how, False) for how in EXECUTIONS), ({}, True), ({"compiled": True}, True)]
)
def test_scalars_that_raise(how: dict[str, Any], trained: bool) -> None:
    """Those of the second group, when those of the first were evaluated."""
    params = parameters()
    optimizer = Falters([{"params": params[:1]}, {"params": params[1:]}], **how)
    train(int(trained), (optimizer, params))
    optimizer.param_groups[1]["fails"] = 1.0
    set_gradients(params)
    assert_raises_and_keeps(optimizer, params, ArithmeticError, "planted in scalars")


@pytest.mark.parametrize("how", [{}, {"foreach": False}], ids=str)
def test_a_rule_that_raises_in_a_first_step(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step is a first step then."""
    ours, same = parameters(2)
    optimizer, reference = Falters(ours, **how), Falters(same, **how)
    set_gradients(ours, same)
    monkeypatch.setattr(Falters, "rule_fails", True)
    assert_raises_and_keeps(optimizer, ours, ArithmeticError, "planted in update")
    monkeypatch.setattr(Falters, "rule_fails", False)
    for _ in range(2):
        optimizer.step()
        reference.step()
        assert_equal(ours, same, atol=0)


# ---- interrupted between the making of state and its first use


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


@both
def test_an_interrupted_first_step_stays_the_first(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first gradient enters the momentum without dampening."""
    ours, stock = parameters(2)
    options = {"momentum": 0.9, "dampening": 0.5}
    mine, theirs = SGD(ours, **options, compiled=compiled), torch.optim.SGD(stock, **options)
    set_gradients(ours, stock)
    before = frozen(mine, ours)
    where, name = (Plan, "run") if compiled else (lists, "run_bucket")
    real = getattr(where, name)
    monkeypatch.setattr(where, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        mine.step()
    monkeypatch.setattr(where, name, real)
    assert_frozen(mine, ours, before)
    for _ in range(3):
        mine.step()
        theirs.step()
        assert_equal(ours, stock)


def test_an_interrupt_after_the_launch_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that came while the kernel ran is raised when it has."""
    ours, stock = parameters(2)
    mine = SGD(ours, momentum=0.9, dampening=0.5, compiled=True)
    theirs = torch.optim.SGD(stock, momentum=0.9, dampening=0.5)
    run = Plan.run

    def interrupted_after(plan: Plan, optimizer: Any, rows: Any) -> Any:
        journal = list(plan.journal)
        outcome = run(plan, optimizer, rows)
        if outcome is None:
            plan.journal += journal  # as if it had not come to clear it
            raise KeyboardInterrupt
        return outcome

    set_gradients(ours, stock)
    monkeypatch.setattr(Plan, "run", interrupted_after)
    with pytest.raises(KeyboardInterrupt):
        mine.step()
    monkeypatch.setattr(Plan, "run", run)
    theirs.step()
    assert_equal(ours, stock)
    train(2, (mine, ours), (theirs, stock))
    assert_equal(ours, stock)
