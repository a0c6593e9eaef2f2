"""Where a graph ends before a step, and what runs there is what runs outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import Model, autograd_traced, batch, build, compile_alone, train
from torch import Tensor

from compiled_optim import SGD, AdamW, lr_scheduler
from compiled_optim.testing import assert_compiles

both = pytest.mark.parametrize("compiled", [False, True], ids=["traced", "compiled"])


def update(optimizer: Any, x: Tensor) -> Tensor:
    optimizer.step()
    return x + 1


def test_a_differentiable_step_is_no_part_of_a_graph() -> None:
    p = torch.ones(2, requires_grad=True)
    q = p.clone()
    optimizer = SGD([q], lr=0.1, differentiable=True)
    q.grad = p * 3
    compile_alone(update)(optimizer, torch.ones(1))
    (gradient,) = torch.autograd.grad(q.sum(), p)
    torch.testing.assert_close(gradient, torch.full((2,), 0.7))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_alone(update, fullgraph=True)(SGD([p.clone()], lr=0.1, differentiable=True), torch.ones(1))


@both
def test_a_step_without_gradients_moves_what_is_attached(compiled: bool) -> None:
    optimizer = SGD([torch.ones(2, requires_grad=True)], lr=0.1, compiled=compiled)
    optimizer.attach(lr_scheduler.ExponentialLR(optimizer, 0.5))
    compile_alone(update, fullgraph=True)(optimizer, torch.ones(1))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@both
def test_gradients_of_another_dtype_than_their_parameter(compiled: bool) -> None:
    """Dynamo takes no such parameter into a graph."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizers = [SGD([p], lr=0.1, compiled=compiled) for p in params]

    def loop(p: Any, optimizer: Any, x: Tensor) -> None:
        (p * x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for p in params:
        p.grad_dtype = torch.float32
    for _ in range(3):
        x = torch.randn(3, dtype=torch.bfloat16)
        compile_alone(loop)(params[0], optimizers[0], x)
        loop(params[1], optimizers[1], x)
        assert torch.equal(*params)


@both
def test_an_epoch_that_is_named(compiled: bool) -> None:
    model, optimizer = build(SGD, options={"lr": 0.1, "compiled": compiled})
    schedule = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10)

    def loop(model: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step(3)
        return loss.detach()

    compile_alone(loop)(model, *batch(0))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.value(3))


@both
def test_hooks_run_once_in_each_step(compiled: bool) -> None:
    model, optimizer = build(AdamW, dtype=torch.float64, options={"compiled": compiled})
    stock, reference = build(torch.optim.AdamW, dtype=torch.float64)
    calls: list[str] = []
    step = compile_alone(train)
    handles: list[Any] = []
    for i in range(6):
        if i == 2:
            handles.append(optimizer.register_step_pre_hook(lambda *_: calls.append("before")))
            handles.append(optimizer.register_step_post_hook(lambda *_: calls.append("after")))
        if i == 4:
            for handle in handles:
                handle.remove()
        step(model, optimizer, None, *batch(i, dtype=torch.float64))
        train(stock, reference, None, *batch(i, dtype=torch.float64))
    assert calls == ["before", "after"] * 2
    for p, q in zip(model.trained, stock.trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@both
def test_scaled_gradients(compiled: bool) -> None:
    """As GradScaler leaves them to the step of an optimizer that can unscale."""
    p = torch.ones(2, requires_grad=True)
    optimizer = SGD([p], lr=0.1, compiled=compiled)
    step = compile_alone(update)
    for found, scale, expected in [(0.0, 2.0, 0.9), (1.0, 2.0, 0.9), (0.0, 4.0, 0.85)]:
        p.grad = torch.full_like(p, 2.0)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(found), torch.tensor(scale)
        step(optimizer, torch.ones(1))
        torch.testing.assert_close(p.detach(), torch.full((2,), expected))


@both
def test_a_step_that_fails_changes_nothing(compiled: bool) -> None:
    model, optimizer = build(AdamW, options={"compiled": compiled})
    step = compile_alone(train)
    step(model, optimizer, None, *batch(0))
    before = [p.detach().clone() for p in model.trained]
    state = {k: v.clone() for k, v in optimizer.state[model.trained[0]].items()}
    optimizer.param_groups[0]["betas"] = (1.0, 0.999)  # of which the bias correction divides by zero
    with pytest.raises(ZeroDivisionError):
        step(model, optimizer, None, *batch(1))
    assert all(torch.equal(p, b) for p, b in zip(model.trained, before, strict=True))
    assert all(torch.equal(optimizer.state[model.trained[0]][k], v) for k, v in state.items())
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    optimizer.zero_grad()
    with assert_compiles(0):
        step(model, optimizer, None, *batch(1))
    assert int(optimizer.state[model.trained[0]]["step"]) == 2


@both
@pytest.mark.parametrize("cls", [AdamW, SGD], ids=lambda cls: cls.__name__)
def test_steps_inside_and_outside_mix(cls: Any, compiled: bool) -> None:
    options = {"lr": 0.05, **({"momentum": 0.9, "dampening": 0.5} if cls is SGD else {})}
    model, optimizer = build(cls, dtype=torch.float64, options={**options, "compiled": compiled})
    stock, reference = build(getattr(torch.optim, cls.__name__), dtype=torch.float64, options=options)
    step = compile_alone(train)
    for i in range(9):
        (train if i % 4 == 3 else step)(model, optimizer, None, *batch(i, dtype=torch.float64))
        train(stock, reference, None, *batch(i, dtype=torch.float64))
    for p, q in zip(model.trained, stock.trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        for name, value in reference.state[q].items():
            torch.testing.assert_close(optimizer.state[p][name], value, rtol=1e-9, atol=1e-12)


@both
@pytest.mark.parametrize("by_scaling", [False, True], ids=["hook", "scaling"])
def test_what_a_step_does_to_gradients_is_seen_after_it(by_scaling: bool, compiled: bool) -> None:
    """By Inductor, which reads a tensor when that suits it: so the graph ends before such a step."""

    def loop(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        total: Any = sum(p.grad.sum() for p in model.trained)
        return total

    runs = []
    for inside in (True, False):
        model, optimizer = build(SGD, dtype=torch.float64, options={"lr": 0.1, "compiled": compiled})
        if by_scaling:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        else:
            optimizer.register_step_pre_hook(halve_gradients)
        with autograd_traced():
            step = compile_alone(loop, "inductor") if inside else loop
            total = step(model, optimizer, *batch(0, dtype=torch.float64))
        runs.append([total, *model.trained, *(p.grad for p in model.trained)])
    torch.testing.assert_close(*runs)


def halve_gradients(optimizer: Any, *_: Any) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = p.grad / 2
