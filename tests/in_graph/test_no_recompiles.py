"""What changes while a loop runs, and needs no other graph and no other kernel."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CLASSES, numbers_of, sample
from loops import Pair, autograd_traced, batch, build, compile_alone, train

from compiled_optim import ASGD, SGD, Adam, AdamW, RMSprop, lr_scheduler
from compiled_optim.declare import Number
from compiled_optim.testing import assert_compiles

DENSE = [cls for cls in CLASSES if cls.accepts_dense]
both = pytest.mark.parametrize("compiled", [False, True], ids=["traced", "compiled"])
# A compiled step is one operator whatever the algorithm; in one graph only the place that gradients come from differs.
EACH = [(cls, False, False) for cls in DENSE]
EACH += [(AdamW, True, False), (AdamW, False, True), (AdamW, True, True)]
IDS = [
    f"{cls.__name__}-{'one graph' if one_graph else 'two graphs'}-{'compiled' if compiled else 'traced'}"
    for cls, compiled, one_graph in EACH
]
each = pytest.mark.parametrize(("cls", "compiled", "one_graph"), EACH, ids=IDS, indirect=["one_graph"])


@pytest.fixture(params=[False, True], ids=["two graphs", "one graph"])
def one_graph(request: Any) -> Iterator[bool]:
    with autograd_traced(request.param):
        yield request.param


def options_of(cls: Any, compiled: bool) -> dict[str, Any]:
    """Every number at a value that has an effect, so that each can change without becoming zero or not."""
    numbers: dict[str, Any] = {k: sample(k, v, 0.5) for k, v in numbers_of(cls).items()}
    return {**numbers, "lr": 0.05, "compiled": compiled}


@each
def test_every_hyperparameter_changes(cls: Any, compiled: bool, one_graph: bool) -> None:
    pair = Pair(cls, options_of(cls, compiled), one_graph)
    pair.step(2)
    with assert_compiles(0):
        for name, field in numbers_of(cls).items():
            value = 0.04 if name == "lr" else sample(name, field, 0.4)
            pair.both(lambda o, _, name=name, value=value: o.param_groups[0].update({name: value}))
            pair.step()
    pair.compare_parameters(1e-6)


@both
@pytest.mark.parametrize("cls", [Adam, SGD], ids=lambda cls: cls.__name__)
def test_tensors_change(cls: Any, compiled: bool, one_graph: bool) -> None:
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in {"lr": 0.05, "weight_decay": 0.1}.items()}
    pair = Pair(cls, {"lr": 0.05, "weight_decay": 0.1, "compiled": compiled}, one_graph)
    pair.ours.param_groups[0].update(tensors)
    pair.step(2)
    with assert_compiles(0):
        for factor in (0.5, 2.0, 0.3):
            for tensor in tensors.values():
                tensor.mul_(factor)
            pair.optimizers[0].param_groups[0].update({k: v.item() for k, v in tensors.items()})
            pair.step()
    pair.compare_parameters(1e-6)


@each
def test_load_state_dict(cls: Any, compiled: bool, one_graph: bool) -> None:
    pair = Pair(cls, {"compiled": compiled, "lr": 0.05}, one_graph)
    pair.step(2)
    file = io.BytesIO()
    torch.save(pair.ours.state_dict(), file)
    file.seek(0)
    saved = [copy.deepcopy(pair.optimizers[0].state_dict()), torch.load(file)]
    weights = [copy.deepcopy(model.state_dict()) for model in pair.models]
    pair.step(3)
    with assert_compiles(0):
        for optimizer, model, state, values in zip(pair.optimizers, pair.models, saved, weights, strict=True):
            optimizer.load_state_dict(state)
            model.load_state_dict(values)
        pair.step(3)
    pair.compare_parameters(1e-6)


@both
@pytest.mark.parametrize("cls", [SGD, AdamW], ids=lambda cls: cls.__name__)
def test_instances(cls: Any, compiled: bool, one_graph: bool) -> None:
    """More than the eight that Dynamo would compile at most."""
    step = compile_alone(train, fullgraph=one_graph)
    runs = [build(cls, seed, options={"compiled": compiled}) for seed in range(10)]
    losses = [step(*runs[0], None, *batch(i)).item() for i in range(3)]
    with assert_compiles(0):
        for run in runs[1:]:
            for i in range(3):
                step(*run, None, *batch(i))
    again = build(cls, 0, options={"compiled": compiled})
    assert [step(*again, None, *batch(i)).item() for i in range(3)] == losses


@pytest.mark.parametrize("cls", [SGD, AdamW, ASGD], ids=lambda cls: cls.__name__)
def test_gradients_rotate(cls: Any) -> None:
    """Of a compiled optimizer: which of its gradients is missing differs from step to step."""
    model, ours = build(cls, dtype=torch.float64, options={"compiled": True})
    stock, theirs = build(getattr(torch.optim, cls.__name__), dtype=torch.float64)
    weights = [torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    ours.add_param_group({"params": weights[0]})
    theirs.add_param_group({"params": weights[1]})

    def update(optimizer: Any, x: torch.Tensor) -> torch.Tensor:
        optimizer.step()
        optimizer.zero_grad()
        return x + 1

    step = compile_alone(update, fullgraph=True)
    for i in range(8):
        for p, q in zip([*model.trained, weights[0]], [*stock.trained, weights[1]], strict=True):
            gradient = None if (id(p) // 64 + i) % 3 == 0 and i else torch.randn_like(p)
            p.grad, q.grad = gradient, None if gradient is None else gradient.clone()
        with assert_compiles(graphs=0 if i else 1):
            step(ours, torch.ones(1))
        theirs.step()
    for p, q in zip(model.trained, stock.trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


@both
def test_train_and_eval(compiled: bool) -> None:
    model, optimizer = build(AdamW, options={"compiled": compiled})
    step = compile_alone(train)
    step(model, optimizer, None, *batch(0))
    with assert_compiles(0):
        for i in range(4):
            model.train(i % 2 == 0)
            step(model, optimizer, None, *batch(i))


@both
def test_accumulation_over_a_varying_number_of_micro_steps(compiled: bool) -> None:
    pair = [
        build(AdamW, dtype=torch.float64, options={"compiled": compiled}),
        build(torch.optim.AdamW, dtype=torch.float64),
    ]

    def micro(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss.detach()

    def update(optimizer: Any, x: torch.Tensor) -> torch.Tensor:
        optimizer.step()
        optimizer.zero_grad()
        return x + 1

    both_ways = [(compile_alone(micro), compile_alone(update, fullgraph=True)), (micro, update)]
    for i, count in enumerate([2, 1, 3, 5, 1]):
        with assert_compiles(graphs=0 if i else 3):  # of the loss, what is returned of it, and the update
            for (model, optimizer), (add, step) in zip(pair, both_ways, strict=True):
                for j in range(count):
                    add(model, *batch(i + j, dtype=torch.float64))
                step(optimizer, torch.ones(1))
    for p, q in zip(pair[0][0].trained, pair[1][0].trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@both
def test_schedules_move_all_they_move(compiled: bool, one_graph: bool) -> None:
    """1,000 steps of OneCycleLR, which moves beta1 too, with a step of its own in the graph."""
    model, optimizer = build(Adam, options={"compiled": compiled})
    stock, reference = build(torch.optim.Adam)
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=1001)
    stock_schedule = torch.optim.lr_scheduler.OneCycleLR(reference, max_lr=0.01, total_steps=1001)
    step = compile_alone(train, fullgraph=one_graph)
    step(model, optimizer, schedule, *batch(0))
    train(stock, reference, stock_schedule, *batch(0))
    with assert_compiles(0):
        for i in range(999):
            step(model, optimizer, schedule, *batch(i))
    for i in range(999):
        train(stock, reference, stock_schedule, *batch(i))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"])
    assert optimizer.param_groups[0]["betas"] == pytest.approx(reference.param_groups[0]["betas"])
    for p, q in zip(model.trained, stock.trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("cls", "switch"), [(SGD, "momentum"), (SGD, "weight_decay"), (RMSprop, "weight_decay")])
def test_a_switch_is_another_graph(cls: Any, switch: str, one_graph: bool) -> None:
    """Of a traced rule: zero and not zero are two graphs, and the values are right in both."""
    assert isinstance(cls.rule.declaration.options[switch], Number)
    pair = Pair(cls, {"lr": 0.01}, one_graph)
    pair.step(2)
    for i, value in enumerate([0.5, 0.6, 0.0, 0.7]):
        pair.both(lambda o, _, value=value: o.param_groups[0].update({switch: value}))
        with assert_compiles(graphs=1 if i == 0 else 0):
            pair.step(2)
    pair.compare_parameters(1e-6)
