"""Formulas: what is one and what is not, what is said of the latter, LaTeX, and the code for tensors."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import sympy as sp
import torch
from schedule_cases import CASES, make_optimizer, near, scheduled, step, theirs

from compiled_optim import lr_scheduler as ours
from compiled_optim.lr_scheduler.formulas import Form, evaluate
from compiled_optim.lr_scheduler.symbolic import applied, t


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (lambda o: ours.StepLR(o, 30, 0.5), sp.Rational(1, 1) * 0.1 * 0.5 ** sp.floor(t / 30)),
        (lambda o: ours.ExponentialLR(o, 0.9), 0.1 * sp.Float(0.9) ** t),
        (lambda o: ours.MultiplicativeLR(o, lambda i: i / (i + 1)), 0.1 / (t + 1)),
        (lambda o: ours.LambdaLR(o, lambda i: 1 - i / 100), 0.1 * (1 - t / 100)),
        (lambda o: ours.SymbolicLR(o, sp.Symbol("base_lr") * sp.cos(sp.Symbol("t"))), 0.1 * sp.cos(t)),
        (
            lambda o: ours.SequentialLR(o, [ours.ConstantLR(o, 1.0, 3), ours.ExponentialLR(o, 0.9)], milestones=[5]),
            sp.Piecewise((sp.Float(0.1), t < 5), (0.1 * sp.Float(0.9) ** (t - 5), True)),
        ),
        (
            lambda o: ours.ChainedScheduler([ours.ExponentialLR(o, 0.9), ours.LinearLR(o, 1.0, 0.5, 10)]),
            0.1 * sp.Float(0.9) ** t * (1 - sp.Min(10, t) / 20),
        ),
    ],
)
def test_expression(scheduler: Any, expected: sp.Expr) -> None:
    expression = scheduler(make_optimizer()).expression()
    assert expression.free_symbols == {t}
    assert all(float(expression.subs(t, i)) == near(float(expected.subs(t, i))) for i in range(40))
    assert sp.count_ops(expression) <= sp.count_ops(expected) + 2


def test_latex() -> None:
    optimizer = make_optimizer()
    assert ours.ExponentialLR(optimizer, 0.9).latex() == r"\eta_{t} = 0.1 \cdot {0.9}^{t}"
    assert r"\left\lfloor{\frac{t}{30}}\right\rfloor" in ours.StepLR(optimizer, 30).latex(group=1)
    cyclic = ours.CyclicLR(optimizer, 0.01, 0.1, step_size_up=10)
    assert cyclic.latex(of="momentum").startswith(r"\mu_{t} = 0.9 - ")


def test_attributes_are_read_when_used() -> None:
    """As in torch, they can be changed at any time."""
    schedulers = [m.StepLR(make_optimizer(), 10, 0.5) for m in (ours, theirs)]
    for i in range(40):
        for scheduler in schedulers:
            if i == 15:
                scheduler.gamma, scheduler.step_size = 0.3, 7
            step(scheduler)
        assert scheduled(schedulers[0].optimizer) == near(scheduled(schedulers[1].optimizer))
    assert schedulers[0].value(7) == near(0.03)


# ---- functions of the user


def test_functions_of_numbers_step_and_say_what_they_are() -> None:
    by_number: list[tuple[Any, str]] = [
        (lambda i: math.cos(i), "takes no symbol .TypeError"),
        (lambda i: 0.1 if i > 5 else 1.0, "takes no symbol .TypeError"),
        (lambda i: [1.0, 0.5][i], "takes no symbol .TypeError"),
        (lambda i: 0.1 if i == 700 else 1.0, "of a symbol it makes 1.0*, and of numbers something else"),
        (lambda i: 0.1 if isinstance(i, int) else i, "of a symbol it makes t"),
        (lambda i: float("nan") * i, "something else"),
    ]
    for function, why in by_number:
        scheduler = ours.LambdaLR(make_optimizer(), function)
        assert scheduler.value(1) == near(0.1 * float(function(1))) or math.isnan(scheduler.value(1))
        for call in (scheduler.expression, scheduler.latex, lambda s=scheduler: s.value(torch.tensor(1.0))):
            with pytest.raises(TypeError, match=f"lr_lambda of param group 0 is not symbolic: .*{why}"):
                call()
    with pytest.raises(TypeError, match=r"the product of .*exp.* has no closed form"):
        ours.MultiplicativeLR(
            make_optimizer(), lambda i: 1 + sp.exp(-i) if isinstance(i, sp.Expr) else 1 + math.exp(-i)
        ).expression()
    cyclic = ours.CyclicLR(make_optimizer(), 0.01, 0.1, step_size_up=5, scale_fn=lambda cycle: math.exp(-cycle))
    assert cyclic.value(5) == near(0.01 + 0.09 * math.exp(-1))
    assert cyclic.value(5, of="momentum") == near(0.9 - 0.1 * math.exp(-1))
    with pytest.raises(TypeError, match="scale_fn is not symbolic: it takes no symbol"):
        cyclic.value(torch.tensor(5.0))


def test_symbolic_lr() -> None:
    s, base = sp.Symbol("t"), sp.Symbol("base_lr", positive=True)
    expressions = [base * sp.Piecewise((s / 10, s < 10), (sp.exp(-s / 30), True)), sp.Float(0.25)]
    scheduler = ours.SymbolicLR(make_optimizer(dtype=torch.float64), expressions)
    lrs = [group["lr"] for group in scheduler.optimizer.param_groups]
    for i in range(50):
        expected = 0.1 * (i / 10 if i < 10 else math.exp(-i / 30))
        assert [lr.item() for lr in lrs] == near([expected, 0.25])
        assert scheduler.value(i) == near(expected)
        step(scheduler)
    assert all(group["lr"] is lr for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True))
    state = scheduler.state_dict()
    assert "expressions" not in state
    other = ours.SymbolicLR(make_optimizer(), expressions)
    other.load_state_dict(state)
    step(other)
    assert scheduled(other.optimizer)[:2] == near([0.1 * math.exp(-51 / 30), 0.25])
    assert ours.SymbolicLR(make_optimizer(), 0.5).value(torch.arange(3.0)).tolist() == [0.5] * 3


def test_symbolic_lr_of_a_text() -> None:
    """It is the expression, follows base_lr, and goes through checkpoints and copies."""

    def make(expression: Any = ("0.5*(1+cos(pi*t/100))", "base_lr*max(0.1, 1 - t/50)")) -> Any:
        return ours.SymbolicLR(make_optimizer(), list(expression))

    scheduler, other = make(), make()
    for i in range(60):
        assert scheduled(scheduler.optimizer)[:2] == near(
            [0.5 * (1 + math.cos(math.pi * i / 100)), 0.02 * max(0.1, 1 - i / 50)]
        )
        step(scheduler)
    other.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    for duplicate in (other, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        duplicate.optimizer._opt_called = True
        duplicate.step()
        assert duplicate.get_last_lr() == near([scheduler.value(61), scheduler.value(61, 1)])
        duplicate.base_lrs = [1.0, 1.0]
        assert duplicate.value(25, 1) == near(0.5)
    assert "expressions" not in scheduler.state_dict()


@pytest.mark.parametrize(
    ("expression", "error", "match"),
    [
        (sp.Symbol("x") * t, ValueError, "symbols t and base_lr, got 'x' in t.x"),
        (b"t/2", TypeError, "must be a sympy expression or the text of one, got b't/2'"),
        (
            "t/2 if t < 9 else 1",
            ValueError,
            "numbers, t, base_lr, pi, E and .*Piecewise.* not 't / 2 if .*; got 't/2 if t",
        ),
        ([t], ValueError, "one entry for each of 2 param groups, got 1"),
        (sp.gamma(t) * sp.zeta(t), TypeError, "has no counterpart"),
    ],
)
def test_symbolic_lr_refuses(expression: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ours.SymbolicLR(make_optimizer(), expression)


def test_errors() -> None:
    optimizer = make_optimizer()
    scheduler = ours.StepLR(optimizer, 3)
    with pytest.raises(ValueError, match="group must be from 0 to 1, got 2"):
        scheduler.value(1, group=2)
    with pytest.raises(ValueError, match=r"of must be one of \('lr',\) for this StepLR, got 'momentum'"):
        scheduler.expression(of="momentum")
    with pytest.raises(ZeroDivisionError, match=r"CosineAnnealingLR divides by zero with .*'T_max': 0"):
        ours.CosineAnnealingLR(optimizer, 0).expression()
    members = [ours.ConstantLR(optimizer), ours.MultiplicativeLR(optimizer, lambda _: 0.9)]
    with pytest.raises(TypeError, match="MultiplicativeLR at index 1 goes on from the lr it finds"):
        ours.SequentialLR(optimizer, members, milestones=[3]).expression()
    with pytest.raises(TypeError, match="LambdaLR at index 1 does not scale"):
        ours.ChainedScheduler([ours.ConstantLR(optimizer), ours.LambdaLR(optimizer, lambda i: i)]).expression()
    with pytest.raises(TypeError, match=r"torch.optim.lr_scheduler.StepLR has no formula"):
        ours.ChainedScheduler([ours.ConstantLR(optimizer), theirs.StepLR(optimizer, 3)]).expression()
    one_cycle = ours.OneCycleLR(optimizer, 0.1, total_steps=10)
    for _ in range(10):
        step(one_cycle)
    with pytest.raises(ValueError, match="Tried to step 11 times"):
        step(one_cycle)


def test_one_cycle_with_a_phase_of_no_steps() -> None:
    """0.1 of 10 steps end at step 0, where torch divides by zero."""
    with pytest.raises(ZeroDivisionError):
        theirs.OneCycleLR(make_optimizer(), 0.3, total_steps=10, pct_start=0.1)
    scheduler = ours.OneCycleLR(make_optimizer(), 0.3, total_steps=10, pct_start=0.1)
    assert scheduled(scheduler.optimizer) == near([0.3, 0.3, 0.85, 0.85])
    step(scheduler)
    assert scheduler.get_last_lr()[0] == near(scheduler.value(1))
    assert ours.OneCycleLR(make_optimizer(), 0.3, total_steps=1).value(0) == near(
        scheduled(theirs.OneCycleLR(make_optimizer(), 0.3, total_steps=1).optimizer)[0]
    )


def test_a_constant_of_zero_comes_back() -> None:
    """torch divides by the factor."""
    stock, mine = (m.ConstantLR(make_optimizer(), factor=0.0, total_iters=3) for m in (theirs, ours))
    values = []
    for _ in range(5):
        values.append(scheduled(mine.optimizer)[0])
        step(mine)
    assert values == [0, 0, 0, 0.1, 0.1]
    step(stock)
    step(stock)
    with pytest.raises(ZeroDivisionError):
        step(stock)


def test_restarts_are_found_where_the_logarithm_is_inexact() -> None:
    """log(243, 3) is 4.999...: torch's step(121) ends a period instead of beginning one."""
    mine, stock = (m.CosineAnnealingWarmRestarts(make_optimizer(), 1, 3) for m in (ours, theirs))
    mine.step(121)
    stock.step(121)
    assert (mine.T_cur, mine.T_i) == (0, 243)
    assert scheduled(mine.optimizer)[0] == near(0.1)
    assert mine.value(121) == mine.value(torch.tensor(121.0, dtype=torch.float64)).item() == near(0.1)
    assert scheduled(stock.optimizer)[0] == near(0.0)


def test_a_sequence_that_begins_with_a_chain() -> None:
    """torch warns of a step too early, and begins one step on."""

    def sequence(m: Any) -> Any:
        o = make_optimizer()
        chain = m.ChainedScheduler([m.LinearLR(o), m.ExponentialLR(o, 0.9)])
        return m.SequentialLR(o, [chain, m.StepLR(o, 30, 0.5)], milestones=[20])

    scheduler = sequence(ours)
    for i in range(60):
        assert scheduled(scheduler.optimizer)[0] == near(scheduler.value(i))
        assert scheduler.get_last_lr()[0] == near(scheduler.value(i))
        step(scheduler)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        stock = sequence(theirs)
    assert scheduled(stock.optimizer)[0] == near(0.9 * scheduler.value(0))


# ---- code


@pytest.mark.parametrize(
    "expression",
    [
        sp.Piecewise((1, (t > 3) & (t < 9)), (2, (t > 20) | sp.Eq(t, 1)), (3, sp.Ne(t, 2)), (4, True)),
        sp.Min(t, 5, 7) * sp.Max(3, t, 2) + sp.Abs(t - 9) + sp.sign(t - 4),
        sp.floor(t / 49) + sp.ceiling(t / 49) + sp.Mod(t, 7) + sp.sqrt(t) + t**2 / 3,
        sp.sin(t) * sp.exp(-t) + sp.log(t + 1) / sp.log(3) + sp.tanh(t) + sp.E + sp.pi + sp.cos(1),
        sp.Heaviside(t - 3, 1) + sp.Piecewise((1, ~((t < 3) | (t > 5))), (0, True)),
        sp.Integer(2),
    ],
)
def test_host_and_tensor_code_agree_with_sympy(expression: sp.Expr) -> None:
    steps = list(range(150))
    expected = [float(expression.subs(t, i)) for i in steps]
    assert [evaluate(Form(applied(expression), {}), i) for i in steps] == near(expected)
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        result = evaluate(Form(applied(expression), {}), torch.tensor(steps, dtype=dtype))
        assert result.dtype == dtype
        assert result.tolist() == near(expected, rel)


def test_tensor_code_is_torch_operations_only() -> None:
    """It traces, and does not read a value: on the meta device there is none."""
    for case, build in CASES.items():
        scheduler = build(ours, make_optimizer())
        assert scheduler.value(torch.empty(5, device="meta")).shape == (5,), case
    scheduler = ours.OneCycleLR(make_optimizer(), 0.3, total_steps=100)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda step: scheduler.value(step))(torch.tensor(3.0))
    steps = torch.arange(100.0)
    assert torch.stack([traced(i) for i in steps]).equal(scheduler.value(steps))


def test_numbers_keep_their_digits() -> None:
    assert evaluate(Form(applied(sp.Float(1 / 3)), {}), 0) == 1 / 3
    assert evaluate(Form(applied(sp.Float(1 / 3)), {}), torch.tensor(0.0, dtype=torch.float64)).item() == 1 / 3


def test_large_steps_in_float32() -> None:
    scheduler = ours.ExponentialLR(make_optimizer(), 0.9999)
    assert scheduler.value(torch.tensor(100_000.0)).item() == near(0.1 * 0.9999**100_000, 1e-6)


def test_the_value_has_memory_of_its_own() -> None:
    scheduler = ours.StepLR(make_optimizer(dtype=torch.float64), 10)
    scheduler.value(torch.tensor(0.0, dtype=torch.float64)).fill_(7.0)
    assert scheduler.value(0) == near(0.1)


def test_schedules_do_without_sympy_until_an_expression_is_asked_for() -> None:
    script = (
        "import sys, torch, compiled_optim; assert 'sympy' not in sys.modules\n"
        "compiled_optim.lr_scheduler.StepLR, compiled_optim.plot_schedule\n"
        "optimizer = compiled_optim.SGD([torch.ones(1)], momentum=0.9)\n"
        "schedule = compiled_optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 9)\n"
        "optimizer.attach(schedule), schedule.value(3), schedule.value(torch.arange(9.0))\n"
        "optimizer.detach(schedule)\n"
        "ready = compiled_optim.lr_scheduler.get_wsd_schedule(optimizer, 3, 4, 20)\n"
        "ready = compiled_optim.lr_scheduler.warmup(ready, 5)\n"
        "optimizer.attach(ready), ready.value(torch.arange(9.0)), optimizer.detach(ready)\n"
        "optimizer.attach(compiled_optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.9**i)), optimizer.step()\n"
        "assert not {'sympy', 'matplotlib'} & set(sys.modules)\n"
        "assert not hasattr(compiled_optim, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=1200)
