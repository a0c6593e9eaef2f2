"""What a graph changes before a step, or after it, is seen or not seen by the step as in the code.

A compiled step is an operator that reads gradients, numbers and schedules where they are; a graph writes at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loops import Model, autograd_traced, batch, build, compile_alone, train
from torch import Tensor

from compiled_optim import SGD, AdamW, lr_scheduler
from compiled_optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from compiled_optim.testing import assert_compiles

both = pytest.mark.parametrize("compiled", [False, True], ids=["traced", "compiled"])
each_backend = pytest.mark.parametrize(
    ("backend", "one_graph"),
    [("aot_eager", False), ("inductor", True)],
    ids=["aot_eager-two graphs", "inductor-one graph"],
    indirect=["one_graph"],
)
Loop = Callable[[Model, Any, Tensor, Tensor], Tensor]


@pytest.fixture(params=[False, True], ids=["two graphs", "one graph"])
def one_graph(request: Any) -> Iterator[bool]:
    with autograd_traced(request.param):
        yield request.param


def assert_like_uncompiled(
    loop: Loop,
    options: dict[str, Any],
    cls: Any = AdamW,
    backend: Any = "aot_eager",
    graphs: int | None = None,
    **more: Any,
) -> Any:
    """Five steps of the loop, compiled with our optimizer and not with torch's; returns ours."""
    model, optimizer = build(cls, dtype=torch.float64, options=options)
    plain = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items() if k != "compiled"}
    stock, reference = build(getattr(torch.optim, cls.__name__), dtype=torch.float64, options=plain)
    step = compile_alone(loop, backend, **more)
    with assert_compiles(graphs=graphs):
        for i in range(5):
            ours = step(model, optimizer, *batch(i, dtype=torch.float64))
            theirs = loop(stock, reference, *batch(i, dtype=torch.float64))
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for p, q in zip(model.trained, stock.trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    return optimizer


def forward_backward(model: Model, x: Tensor, y: Tensor) -> Tensor:
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.detach()


@both
@each_backend
def test_clipped_gradients(compiled: bool, backend: str, one_graph: bool) -> None:
    def loop(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.trained, 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    graphs = 1 if one_graph else 2
    assert_like_uncompiled(loop, {"lr": 0.1, "compiled": compiled}, SGD, backend, graphs, fullgraph=one_graph)


@both
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_changed_after_the_step(compiled: bool, backend: str) -> None:
    def loop(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        optimizer.step()
        for p in model.trained:
            p.grad.zero_()
        return x + 1

    def both_halves(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = forward_backward(model, x, y)
        half(model, optimizer, x, y)
        return loss

    half: Any = compile_alone(loop, backend, fullgraph=True)
    model, optimizer = build(SGD, dtype=torch.float64, options={"lr": 0.1, "compiled": compiled})
    stock, reference = build(torch.optim.SGD, dtype=torch.float64, options={"lr": 0.1})
    for i in range(4):
        data = batch(i, dtype=torch.float64)
        both_halves(model, optimizer, *data)
        forward_backward(stock, *data)
        loop(stock, reference, *data)
    for p, q in zip(model.trained, stock.trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@both
def test_gradients_that_are_kept_and_zeroed(compiled: bool, one_graph: bool) -> None:
    def loop(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    optimizer = assert_like_uncompiled(loop, {"lr": 0.1, "compiled": compiled})
    for p in optimizer.param_groups[0]["params"]:
        assert torch.equal(p.grad, torch.zeros_like(p))


@both
def test_gradients_zeroed_first(compiled: bool, one_graph: bool) -> None:
    def loop(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    assert_like_uncompiled(loop, {"lr": 0.1, "compiled": compiled})


@both
@each_backend
def test_parameters_changed_around_the_step(compiled: bool, backend: str, one_graph: bool) -> None:
    def loop(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        with torch.no_grad():
            for p in model.trained:
                p.mul_(0.9)
        optimizer.step()
        with torch.no_grad():
            for p in model.trained:
                p.clamp_(-0.2, 0.2)
        optimizer.zero_grad()
        return loss.detach()

    assert_like_uncompiled(loop, {"lr": 0.1, "compiled": compiled}, AdamW, backend, 1 if one_graph else 2)


@both
@each_backend
def test_a_tensor_lr_changed_before_the_step(compiled: bool, backend: str, one_graph: bool) -> None:
    lr = torch.tensor(0.1)  # in float64 torch 2.13 loses such a write

    def loop(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"].mul_(0.8)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    optimizer = assert_like_uncompiled(loop, {"lr": lr, "compiled": compiled}, SGD, backend)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.1 * 0.8**5, rel=1e-5)


@both
def test_a_number_changed_before_the_step(compiled: bool) -> None:
    """That change comes after the graph, which therefore ends before the step."""

    def loop(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.2
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    assert_like_uncompiled(loop, {"lr": 0.1, "compiled": compiled}, SGD)
    with autograd_traced(), pytest.raises(torch._dynamo.exc.Unsupported):
        assert_like_uncompiled(loop, {"lr": 0.1, "compiled": compiled}, SGD, fullgraph=True)


@both
@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
def test_two_optimizers_and_their_schedules(compiled: bool, tensor: bool, one_graph: bool) -> None:
    """In one graph the schedule of the first moves before the second steps, and each sees its own."""

    def built(stock: bool) -> tuple[Any, ...]:
        model, _ = build(SGD, dtype=torch.float64)
        halves = [model.trained[:3], model.trained[3:]]
        rates = [torch.tensor(0.1, dtype=torch.float64) if tensor and not stock else 0.1 for _ in halves]
        kinds = (torch.optim.SGD, torch.optim.AdamW) if stock else (SGD, AdamW)
        more = {} if stock else {"compiled": compiled}
        optimizers = [c(h, lr=r, **more) for c, h, r in zip(kinds, halves, rates, strict=True)]
        module: Any = torch.optim.lr_scheduler if stock else lr_scheduler
        return model, *optimizers, module.ExponentialLR(optimizers[0], 0.5), module.StepLR(optimizers[1], 2)

    def loop(model: Any, a: Any, b: Any, s: Any, t: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        a.step()
        s.step()
        b.step()
        t.step()
        a.zero_grad()
        b.zero_grad()
        return loss.detach()

    ours, theirs = built(False), built(True)
    step = compile_alone(loop, fullgraph=one_graph)
    with assert_compiles(graphs=1 if one_graph else 2):
        for i in range(5):
            step(*ours, *batch(i, dtype=torch.float64))
            loop(*theirs, *batch(i, dtype=torch.float64))
    for p, q in zip(ours[0].trained, theirs[0].trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    for o, r in zip(ours[1:3], theirs[1:3], strict=True):
        assert float(o.param_groups[0]["lr"]) == pytest.approx(r.param_groups[0]["lr"])


@both
def test_a_schedule_that_is_attached(compiled: bool, one_graph: bool) -> None:
    model, optimizer = build(SGD, options={"lr": 0.1, "compiled": compiled})
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.attach(schedule)
    step = compile_alone(train, fullgraph=one_graph)
    with assert_compiles(graphs=1 if one_graph else 2):
        for i in range(4):
            step(model, optimizer, None, *batch(i))
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (i + 1))


def test_a_metric_of_the_graph_moves_a_plateau(one_graph: bool) -> None:
    model, optimizer = build(SGD, options={"lr": 0.1})
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, threshold=10.0, threshold_mode="abs")

    def loop(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step(loss)
        return loss.detach()

    step = compile_alone(loop, fullgraph=one_graph)
    with assert_compiles(graphs=1 if one_graph else 2):
        for i in range(6):
            step(model, optimizer, *batch(i))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@both
def test_an_average_after_the_step(compiled: bool) -> None:
    """It is updated outside of graphs: one break, and the weights that the step made."""
    model, optimizer = build(AdamW, options={"compiled": compiled})
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), compiled=compiled)
    expected = [p.detach().clone() for p in model.parameters()]

    def loop(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        return loss.detach()

    step = compile_alone(loop)
    for i in range(4):
        step(model, optimizer, *batch(i))
        weights = [p.detach() for p in model.parameters()]
        expected = [e.lerp(w, 0.1) if i else w.clone() for e, w in zip(expected, weights, strict=True)]
    for p, e in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e)
