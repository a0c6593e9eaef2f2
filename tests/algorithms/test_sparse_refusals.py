"""Sparse gradients that are refused, and those that only an eager step takes."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from beside_torch import Lockstep, tensors
from cases import CLASSES, oracle
from test_sparse import agree, coo, each_class, execution, random_rows, step
from torch import Tensor, nn

from compiled_optim import SGD, Adagrad, CompileError, CompileFallbackWarning, SparseAdam, explain

SHAPE = (6, 3)


def everything(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Parameters and state, bit by bit, but for state of zeros: it is as good as none."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [[(k, v.tolist()) for k, v in optimizer.state.get(p, {}).items() if v.any()] for p in params]
    return [[p.tolist() for p in params], state]


def parameters(*shapes: tuple[int, ...]) -> list[Any]:
    return [nn.Parameter(t) for t in tensors(shapes or [SHAPE, SHAPE])]


def give(params: list[Any], *gradients: Tensor) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = g


@execution
@pytest.mark.parametrize("at", [0, 2], ids=["first step", "later"])
def test_sparse_adam_refuses_dense_gradients(at: int, compiled: bool) -> None:
    params, stock = parameters(), parameters()
    optimizer = SparseAdam(params, compiled=compiled)
    for _ in range(at):
        give(params, random_rows(SHAPE, 2), random_rows(SHAPE, 3))
        optimizer.step()
    before = everything(optimizer)
    give(params, random_rows(SHAPE, 2), torch.randn(SHAPE).double())
    give(stock, random_rows(SHAPE, 2), torch.randn(SHAPE).double())
    with pytest.raises(RuntimeError) as expected:
        torch.optim.SparseAdam(stock).step()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
            optimizer.step()
        assert everything(optimizer) == before
    if not at:
        assert not optimizer.state
    give(params, random_rows(SHAPE, 2), random_rows(SHAPE, 3))
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == at + 1


@pytest.mark.parametrize(
    ("kind", "make"),
    [("sparse", lambda: torch.ones(3, 2).to_sparse()), ("complex", lambda: torch.ones(3, dtype=torch.complex64))],
)
def test_sparse_adam_refuses_parameters(kind: str, make: Any) -> None:
    good = parameters()
    for params in ([make()], [*good, make()], [{"params": good}, {"params": [make()]}]):
        with pytest.raises(ValueError, match=rf"{kind.title()} params at indices"):
            torch.optim.SparseAdam(params)
        with pytest.raises(ValueError, match=f"SparseAdam: params must be dense and real, got a {kind}"):
            SparseAdam(params)
    optimizer = SparseAdam(good)
    with pytest.raises(ValueError, match=f"got a {kind} one at index 1"):
        optimizer.add_param_group({"params": [*parameters(), make()][1:]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("compiled", [False, True, "foreach"])
@pytest.mark.parametrize("cls", [c for c in CLASSES if not c.accepts_sparse], ids=lambda c: c.__name__)
def test_other_algorithms_refuse_sparse_gradients(cls: Any, compiled: bool | str) -> None:
    params, stock = parameters(), parameters()
    give(stock, torch.randn(SHAPE).double(), random_rows(SHAPE, 2))
    with pytest.raises(RuntimeError, match="sparse gradients"):
        oracle(cls)(stock).step()
    optimizer = cls(params, compiled=compiled)
    before = everything(optimizer)
    give(params, torch.randn(SHAPE).double(), random_rows(SHAPE, 2))
    with pytest.raises(RuntimeError, match=f"^{cls.__name__} does not support sparse gradients, .* SparseAdam"):
        optimizer.step()
    assert everything(optimizer) == before
    assert not optimizer.state


@execution
def test_adagrad_refuses_weight_decay_of_sparse_gradients(compiled: bool) -> None:
    params = parameters()
    optimizer = Adagrad([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}], compiled=compiled)
    give(params, random_rows(SHAPE, 2), random_rows(SHAPE, 2))
    before = everything(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="weight_decay must be 0 for sparse gradients"):
            optimizer.step()
        assert everything(optimizer) == before
    optimizer.param_groups[1]["weight_decay"] = 0
    optimizer.step()
    assert everything(optimizer) != before


@execution
@pytest.mark.parametrize("at", [0, 2], ids=["first step", "later"])
@pytest.mark.parametrize("index", [[[0, 6]], [[1, -1]], [[0, 1], [0, 3]]], ids=["too large", "negative", "column"])
@each_class
def test_an_index_out_of_range(cls: Any, index: list[list[int]], at: int, compiled: bool) -> None:
    """Found before anything is written, also of the parameters before it."""
    params = parameters()
    optimizer = cls(params, compiled=compiled)
    for _ in range(at):
        give(params, random_rows(SHAPE, 2), random_rows(SHAPE, 3))
        optimizer.step()
    before = everything(optimizer)
    values = torch.randn(2, *SHAPE[len(index) :], dtype=torch.float64)
    wrong = torch.sparse_coo_tensor(torch.tensor(index), values, SHAPE, check_invariants=False)
    give(params, random_rows(SHAPE, 2), wrong)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="index"):
            optimizer.step()
        assert everything(optimizer) == before
    give(params, random_rows(SHAPE, 2), random_rows(SHAPE, 3))
    optimizer.step()
    assert everything(optimizer) != before


# ---- what steps eagerly


def follow(run: Lockstep, compiled: bool, reason: str, *steps: list[Any]) -> None:
    """Steps beside torch; if compiled, the first sparse gradient warns once that it falls back."""
    warned = False
    for gradients in steps:
        if compiled and not warned and any(g.is_sparse for g in gradients):
            with pytest.warns(CompileFallbackWarning, match=f"updated eagerly, because .*{reason}") as record:
                step(run, *gradients)
            assert len(record) == 1
            warned = True
        else:
            step(run, *gradients)  # a second warning would be an error
    if compiled:
        assert any(re.search(reason, row.reason) for row in explain(run.ours))


EVERY_ROW = [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5}]


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("compiled", [False, True, "foreach"])
@pytest.mark.parametrize("options", EVERY_ROW, ids=str)
def test_momentum_updates_every_row(options: dict[str, Any], compiled: bool | str) -> None:
    run = Lockstep(
        lambda params: torch.optim.SGD(params, lr=0.1, **options),
        lambda params: SGD(params, lr=0.1, compiled=compiled, **options),
        tensors([SHAPE, (4,)]),
    )
    dense = [torch.randn(4).double() for _ in range(5)]
    # torch.optim cannot go on with a dense gradient after a sparse one
    tables = [random_rows(SHAPE, 2), coo([[5, 0, 5]], SHAPE), random_rows(SHAPE, 8), coo([[]], SHAPE)]
    if compiled == "foreach":
        with pytest.warns(CompileFallbackWarning, match="sparse gradients are applied eagerly"):
            step(run, tables[0], dense[0])
        for gradients in zip(tables[1:], dense, strict=False):
            step(run, *gradients)
        return
    follow(run, compiled, "sparse and these options", *map(list, zip(tables, dense, strict=False)))
    if compiled:
        assert {(row.execution, row.tensors) for row in explain(run.ours)} == {("multi_tensor", 1), ("eager", 1)}


@execution
@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("ignore:.*updated eagerly")
def test_momentum_of_torch_that_is_sparse_is_loaded(compiled: bool) -> None:
    run = Lockstep(
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: SGD(params, momentum=0.9, compiled=compiled),
        tensors([SHAPE]),
    )
    (theirs,), (ours,) = run.params
    for _ in range(2):
        theirs.grad = random_rows(SHAPE, 2)
        run.optimizers[0].step()
    ours.data.copy_(theirs.data)
    assert run.optimizers[0].state[theirs]["momentum_buffer"].is_sparse
    run.ours.load_state_dict(copy.deepcopy(run.optimizers[0].state_dict()))
    for _ in range(2):
        step(run, random_rows(SHAPE, 2))


@pytest.mark.usefixtures("lenient")
@execution
def test_momentum_of_dense_and_sparse_gradients_by_turns(compiled: bool) -> None:
    run = Lockstep(
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: SGD(params, lr=0.1, momentum=0.9, compiled=compiled),
        tensors([SHAPE]),
    )
    dense, sparse = (lambda: torch.randn(SHAPE).double()), (lambda: random_rows(SHAPE, 3))
    follow(run, compiled, "sparse and these options", *([make()] for make in (dense, sparse, dense, sparse)))


def test_that_is_an_error_in_strict_mode() -> None:
    params = parameters()
    optimizer = SGD(params, momentum=0.9, compiled=True)
    give(params, random_rows(SHAPE, 2), torch.ones(SHAPE).double())
    before = everything(optimizer)
    for _ in range(2):
        with pytest.raises(CompileError, match="sparse"):
            optimizer.step()
        assert everything(optimizer) == before
        assert not optimizer.state


@pytest.mark.usefixtures("lenient")
@execution
@each_class
def test_a_parameter_that_is_not_contiguous(cls: Any, compiled: bool) -> None:
    run = Lockstep(
        lambda params: oracle(cls)(params, lr=0.1),
        lambda params: cls(params, lr=0.1, compiled=compiled),
        [torch.randn(SHAPE[::-1]).double().t()],
    )
    assert not run.params[1][0].is_contiguous()
    steps = [[random_rows(SHAPE, count)] for count in (3, 8, 0)]
    follow(run, compiled, "sparse.*contiguous", *steps, [coo([[3, 0, 3], [2, 1, 2]], SHAPE)])


@pytest.mark.usefixtures("lenient")
@execution
def test_complex_parameters(compiled: bool) -> None:
    """SGD only: of a complex sparse gradient torch's Adagrad takes the complex square."""
    run = Lockstep(
        lambda params: torch.optim.SGD(params, lr=0.1),
        lambda params: SGD(params, lr=0.1, compiled=compiled),
        tensors([SHAPE], torch.complex128),
    )
    follow(run, compiled, "sparse.*reals", *([random_rows(SHAPE, count, torch.complex128)] for count in (3, 8, 0)))


@execution
@each_class
def test_a_gradient_of_another_dtype(cls: Any, compiled: bool) -> None:
    run = Lockstep(
        lambda params: oracle(cls)(params, lr=0.1),
        lambda params: cls(params, lr=0.1, compiled=compiled),
        tensors([SHAPE]),
    )
    (theirs,), (ours,) = run.params
    ours.grad_dtype = torch.float32
    for _ in range(3):
        ours.grad = random_rows(SHAPE, 4, torch.float32).coalesce()
        theirs.grad = ours.grad.double()
        for optimizer in run.optimizers:
            optimizer.step()
        agree(run)
    assert {row.execution for row in explain(run.ours)} == {"multi_tensor" if compiled else "eager"}


@pytest.mark.usefixtures("lenient")
@each_class
def test_the_foreach_lowering_applies_sparse_gradients_eagerly(cls: Any) -> None:
    run = Lockstep(
        lambda params: oracle(cls)(params, lr=0.1),
        lambda params: cls(params, lr=0.1, compiled="foreach"),
        tensors([SHAPE]),
    )
    with pytest.warns(CompileFallbackWarning, match="sparse gradients are applied eagerly"):
        step(run, random_rows(SHAPE, 4))
    step(run, random_rows(SHAPE, 2))
