"""Gradients of every kind: differentiable steps, sparse gradients, another dtype than their parameter's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CLASSES, oracle

from compiled_optim import SGD, Adam, AdamW, CompileError, CompileFallbackWarning, Optimizer, explain

both = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
DIFFERENTIABLE = [
    (cls, options)
    for cls, options in [*((cls, {}) for cls in CLASSES), (AdamW, {"maximize": True})]
    if "differentiable" in cls.declaration.signature().parameters
]


def unrolled(cls: Any, start: torch.Tensor, lr: torch.Tensor, **options: Any) -> torch.Tensor:
    """A loss after three steps, as a function of the first parameters and the learning rate."""
    target = torch.linspace(-1, 1, start.numel(), dtype=start.dtype).view_as(start)
    p = start.clone()
    optimizer = cls([p], lr=lr, differentiable=True, **options)
    for _ in range(3):
        (p.grad,) = torch.autograd.grad((p - target).sin().square().sum(), p, create_graph=True)
        optimizer.step()
    return ((p - target) ** 2).sum()


@pytest.mark.parametrize(("cls", "options"), DIFFERENTIABLE, ids=lambda v: getattr(v, "__name__", str(v)))
def test_differentiable_steps_have_the_gradients_of_torch(cls: type[Optimizer], options: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)  # torch.optim counts steps in it, and takes powers of the count
    start = torch.randn(3, 4)
    results = []
    for made in (cls, oracle(cls)):
        inputs = start.clone().requires_grad_(), torch.tensor(0.05, requires_grad=True)
        loss = unrolled(made, *inputs, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    assert results[0][1].abs().min() > 0
    assert results[0][2] != 0


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SGD, {}),
        (Adam, {}),
        # torch.optim cannot: it overwrites what these saved for the backward pass, or cuts the graph
        (SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (SGD, {"momentum": 0.9, "nesterov": True}),
        (Adam, {"amsgrad": True, "weight_decay": 0.1}),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_gradcheck(cls: type[Optimizer], options: dict[str, Any]) -> None:
    start = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, rate: unrolled(cls, p, rate, **options), (start, lr))


@both
def test_capturable_needs_a_device_with_graphs(compiled: bool) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p], capturable=True, compiled=compiled)
    with pytest.raises(RuntimeError, match=r"capturable=True .* cpu"):
        optimizer.step()
    assert not optimizer.state
    assert p.tolist() == [1.0] * 3


# ---- sparse gradients


def sparse_like(p: torch.Tensor, rows: list[int]) -> torch.Tensor:
    values = torch.randn(len(rows), *p.shape[1:], dtype=p.dtype)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, p.shape, check_invariants=True)


OPTIONS = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"maximize": True}]


def pair_of_tables() -> Any:
    table, dense = torch.randn(6, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    return [[torch.nn.Parameter(table.clone()), torch.nn.Parameter(dense.clone())] for _ in range(2)]


@pytest.mark.usefixtures("lenient")
@both
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sgd_takes_sparse_gradients(options: dict[str, Any], compiled: bool) -> None:
    ours, stock = pair_of_tables()
    mine, theirs = SGD(ours, lr=0.1, compiled=compiled, **options), torch.optim.SGD(stock, lr=0.1, **options)
    caught: list[str] = []
    for rows in ([0, 2], [5, 0, 5, 5], [1], []):  # the second is not coalesced
        grads = [sparse_like(ours[0], rows), torch.randn_like(ours[1])]
        for params in (ours, stock):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
        theirs.step()
        if compiled and not caught:
            with pytest.warns(CompileFallbackWarning, match="updated eagerly.*sparse") as record:
                mine.step()
            caught += [str(w.message) for w in record]
        else:
            mine.step()  # a second warning would be an error
        for p, q in zip(ours, stock, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-12)
        assert mine.state.get(ours[0], {}).keys() == ({"momentum_buffer"} if "momentum" in options else set())
    if compiled:
        assert len(caught) == 1
        rows_of_explain = {(r.execution, r.tensors) for r in explain(mine)}
        assert rows_of_explain == {("multi_tensor", 1), ("eager", 1)}
        assert any("sparse" in r.reason for r in explain(mine))


@pytest.mark.usefixtures("lenient")
@both
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
def test_an_embedding_becomes_sparse_and_dense_again(options: dict[str, Any], compiled: bool) -> None:
    ours, stock = pair_of_tables()
    mine, theirs = SGD(ours[:1], lr=0.1, compiled=compiled, **options), torch.optim.SGD(stock[:1], lr=0.1, **options)
    for rows in (None, [0, 2], None, [1, 1]):
        grad = torch.randn_like(ours[0]) if rows is None else sparse_like(ours[0], rows)
        ours[0].grad, stock[0].grad = grad.clone(), grad.clone()
        theirs.step()
        if compiled and rows == [0, 2]:
            with pytest.warns(CompileFallbackWarning):
                mine.step()
        else:
            mine.step()
        torch.testing.assert_close(ours[0].detach(), stock[0].detach(), rtol=0, atol=1e-12)


def test_sparse_gradients_are_an_error_in_strict_mode() -> None:
    ours = pair_of_tables()[0]
    ours[0].grad, ours[1].grad = sparse_like(ours[0], [0]), torch.ones_like(ours[1])
    before = [p.detach().clone() for p in ours]
    optimizer = SGD(ours, momentum=0.9, compiled=True)
    for _ in range(2):
        with pytest.raises(CompileError, match="sparse"):
            optimizer.step()
        assert [p.detach().tolist() for p in ours] == [p.tolist() for p in before]
        assert not optimizer.state


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("compiled", [False, True, "foreach"])
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_adam_refuses_sparse_gradients_before_anything_is_written(cls: type[Optimizer], compiled: bool | str) -> None:
    stock = pair_of_tables()[0][:1]
    stock[0].grad = sparse_like(stock[0], [0])
    with pytest.raises(RuntimeError) as expected:
        oracle(cls)(stock).step()
    ours = pair_of_tables()[0]
    dense = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    params = [dense, *ours]
    for p in (dense, ours[1]):
        p.grad = torch.ones_like(p)
    ours[0].grad = sparse_like(ours[0], [0])
    before = [p.detach().tolist() for p in params]
    optimizer = cls(params, compiled=compiled)
    with pytest.raises(RuntimeError, match="does not support sparse gradients, please consider SparseAdam") as error:
        optimizer.step()
    stock_message, ours_message = str(expected.value), str(error.value)
    assert ours_message.removeprefix(cls.__name__) == stock_message.removeprefix("Adam")
    assert [p.detach().tolist() for p in params] == before
    assert not optimizer.state


# ---- a gradient of another dtype


@both
@pytest.mark.parametrize("cls", [SGD, AdamW])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_grad_dtype(cls: type[Optimizer], dtype: torch.dtype, grad_dtype: torch.dtype, compiled: bool) -> None:
    values = torch.randn(2, 5, dtype=dtype)
    ours, stock = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    plain = torch.nn.Parameter(values.clone())
    ours.grad_dtype = grad_dtype
    mine, theirs = cls([ours, plain], lr=0.1, compiled=compiled), oracle(cls)([stock], lr=0.1)
    for _ in range(3):
        ours.grad = torch.randn(2, 5, dtype=grad_dtype)
        stock.grad, plain.grad = ours.grad.to(dtype), ours.grad.to(dtype)
        kept, version = ours.grad, ours.grad._version
        mine.step()
        theirs.step()
        assert ours.grad is kept
        assert kept._version == version
        assert ours.dtype is dtype
        tolerance = 1e-12 if dtype is torch.float64 else 2e-6
        torch.testing.assert_close(ours.detach(), stock.detach(), rtol=0, atol=tolerance)
        assert torch.equal(ours, plain)
    assert {row.execution for row in explain(mine)} == {"multi_tensor" if compiled else "eager"}
    assert all(t.dtype is dtype for k, t in mine.state.get(ours, {}).items() if k != "step")


@both
def test_the_dtype_of_a_gradient_may_change_between_steps(compiled: bool) -> None:
    values = torch.randn(2, 5, dtype=torch.float64)
    ours, stock = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    mine, theirs = AdamW([ours], lr=0.1, compiled=compiled), torch.optim.AdamW([stock], lr=0.1)
    for dtype in (torch.float64, torch.float32, torch.float64, torch.bfloat16):
        ours.grad = None
        ours.grad_dtype = dtype
        ours.grad = torch.randn(2, 5).to(dtype)
        stock.grad = ours.grad.double()
        mine.step()
        theirs.step()
        torch.testing.assert_close(ours.detach(), stock.detach(), rtol=0, atol=1e-12)


@both
def test_a_gradient_laid_out_otherwise(compiled: bool) -> None:
    values = torch.randn(4, 5, dtype=torch.float64)
    ours, stock = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    mine, theirs = AdamW([ours], lr=0.1, compiled=compiled), torch.optim.AdamW([stock], lr=0.1)
    base = torch.randn(5, 4, dtype=torch.float64)
    for grad in (base.t(), base.t().contiguous(), torch.randn(4, 1, dtype=torch.float64).expand(4, 5), base.t()):
        ours.grad, stock.grad = grad, grad.contiguous()
        mine.step()
        theirs.step()
        torch.testing.assert_close(ours.detach(), stock.detach(), rtol=0, atol=1e-12)
