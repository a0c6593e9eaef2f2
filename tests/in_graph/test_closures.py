"""A closure given to a step in a compiled function is compiled too, and training is as without ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import assert_same
from cases import CLASSES, tolerance
from loops import Model, autograd_traced, batch, build, compile_alone, train
from torch import Tensor

from compiled_optim import LBFGS, SGD, Adagrad, AdamW, SparseAdam, explain
from compiled_optim.testing import assert_compiles

DENSE = [cls for cls in CLASSES if cls.accepts_dense]
both = pytest.mark.parametrize("compiled", [False, True], ids=["traced", "compiled"])


def step_with_closure(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return optimizer.step(closure)


def detached_step_with_closure(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """A graph with ``backward()`` in it does not return the loss with its history."""
    loss: Tensor = step_with_closure(model, optimizer, x, y).detach()
    return loss


def assert_like_torch(
    loop: Callable[..., Any], ours: Any, stock: Any, graphs: int, rtol: float = 1e-9, steps: int = 5, **more: Any
) -> None:
    """Steps of a loop over (model, optimizer), of ours compiled and of torch's not; all graphs are of the first."""
    step = compile_alone(loop, **more)
    for i in range(steps):
        data = batch(i, ours[0].embedding is not None, torch.float64)
        with assert_compiles(graphs=0 if i else graphs):
            loss = step(*ours, *data)
        assert_same(loss, loop(*stock, *data), rtol, "loss")
    for p, q in zip(ours[0].trained, stock[0].trained, strict=True):
        assert_same(p, q, rtol, "parameter")


def pair(cls: Any, compiled: bool, **options: Any) -> tuple[tuple[Model, Any], tuple[Model, Any]]:
    """Model and optimizer, and the same ones with torch's."""
    stock = build(getattr(torch.optim, cls.__name__), dtype=torch.float64, options=options)
    return build(cls, dtype=torch.float64, options={**options, "compiled": compiled}), stock


@pytest.mark.parametrize(
    ("cls", "compiled"),
    [*((cls, False) for cls in DENSE), (AdamW, True), (SGD, True)],
    ids=lambda v: getattr(v, "__name__", "compiled" if v else "traced"),
)
def test_a_closure_and_the_update(cls: Any, compiled: bool) -> None:
    assert_like_torch(step_with_closure, *pair(cls, compiled), 2, tolerance(cls))


@both
@pytest.mark.parametrize("cls", [SGD, AdamW], ids=lambda cls: cls.__name__)
def test_a_closure_in_the_graph_of_the_update(cls: Any, compiled: bool) -> None:
    with autograd_traced():
        assert_like_torch(detached_step_with_closure, *pair(cls, compiled), 1, tolerance(cls), fullgraph=True)


# ---- LBFGS


@both
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(search: str | None, compiled: bool) -> None:
    """Its step calls the closure several times, always through the one graph."""
    calls = [0]

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls[0] += 1
            return graph(*args)

        return run

    ours, stock = pair(LBFGS, compiled, line_search_fn=search, max_iter=6)
    assert_like_torch(step_with_closure, ours, stock, 1, steps=4, backend=backend)
    mine, theirs = (optimizer.state_dict()["state"][0] for _, optimizer in (ours, stock))
    assert calls == [mine["func_evals"]] == [theirs["func_evals"]]
    assert calls[0] > 20
    assert [row.execution for row in explain(ours[1])] == ["lbfgs" if compiled else "eager"]


@both
def test_lbfgs_is_one_break(compiled: bool) -> None:
    ours, _ = pair(LBFGS, compiled)
    step = compile_alone(step_with_closure, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        step(*ours, *batch(0, dtype=torch.float64))


# ---- sparse gradients


def sparse_pair(cls: Any, compiled: bool) -> tuple[tuple[Model, Any], tuple[Model, Any]]:
    """As `pair`, of a model that gives sparse gradients to classes which take dense ones too."""
    models = [Model(sparse=True, dtype=torch.float64) for _ in range(2)]
    models[0].load_state_dict(models[1].state_dict())
    stock = getattr(torch.optim, cls.__name__)(models[1].trained, lr=0.1)
    return (models[0], cls(models[0].trained, lr=0.1, compiled=compiled)), (models[1], stock)


def step_alone(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    return train(model, optimizer, None, x, y)


@both
@pytest.mark.parametrize("loop", [step_alone, step_with_closure], ids=lambda f: f.__name__)
@pytest.mark.parametrize("cls", [SparseAdam, Adagrad, SGD], ids=lambda cls: cls.__name__)
def test_sparse_gradients(cls: Any, loop: Callable[..., Any], compiled: bool) -> None:
    ours, stock = sparse_pair(cls, compiled)
    before = ours[0].trained[0].detach().clone()
    assert_like_torch(loop, ours, stock, 2)
    assert not torch.equal(ours[0].trained[0], before)


@both
@pytest.mark.parametrize("sparse_first", [False, True])
def test_sparse_and_dense_gradients_by_turns(sparse_first: bool, compiled: bool) -> None:
    ours, stock = sparse_pair(Adagrad, compiled)

    def update(optimizer: Any, x: Tensor) -> Tensor:
        optimizer.step()
        return x + 1

    step = compile_alone(update, fullgraph=True)
    compilations = []
    for i in range(6):
        gradient = torch.randn(20, 6, dtype=torch.float64)
        gradient[i:] = 0
        for model, _ in (ours, stock):
            model.trained[0].grad = gradient.to_sparse(1) if i % 2 != sparse_first else gradient.clone()
        with assert_compiles() as found:
            step(ours[1], torch.ones(1))
        stock[1].step()
        compilations.append(found.graphs)
        assert_same(ours[0].trained[0], stock[0].trained[0])
    assert sum(compilations[2:]) == 0
