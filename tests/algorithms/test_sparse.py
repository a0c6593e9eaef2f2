"""Sparse COO gradients: the rows they touch, and no others, take the step of torch.optim."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import Lockstep, assert_same, parameter, state_of, tensors
from cases import CLASSES, oracle, with_all_numbers
from torch import Tensor, nn

import compiled_optim
from compiled_optim import explain
from compiled_optim.testing import assert_compiles

SPARSE = [cls for cls in CLASSES if cls.accepts_sparse]
BOTH = [cls for cls in SPARSE if cls.accepts_dense]
execution = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
each_class = pytest.mark.parametrize("cls", SPARSE, ids=lambda cls: cls.__name__)
each_that_takes_both = pytest.mark.parametrize("cls", BOTH, ids=lambda cls: cls.__name__)


def coo(indices: Any, shape: tuple[int, ...], values: Tensor | None = None, dtype: Any = torch.float64) -> Tensor:
    at = torch.as_tensor(indices, dtype=torch.int64)
    values = torch.randn(at.shape[1], *shape[at.shape[0] :], dtype=dtype) if values is None else values
    return torch.sparse_coo_tensor(at, values, shape, check_invariants=True)


def random_rows(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A gradient of ``count`` rows, some of them repeated, as an embedding's backward pass returns it."""
    return coo(torch.randint(shape[0], (1, count)), shape, dtype=dtype)


def lockstep(cls: Any, initial: list[Tensor], compiled: bool | str, options: dict[str, Any] | None = None) -> Lockstep:
    options = {"lr": 0.1} if options is None else options
    return Lockstep(
        lambda params: oracle(cls)(params, **options),
        lambda params: cls(params, compiled=compiled, **options),
        initial,
    )


def step(run: Lockstep, *gradients: Tensor | None) -> None:
    """One step of both with the very same gradients, for a copy would be laid out otherwise; and they agree."""
    run.both(lambda _, params: [setattr(p, "grad", g) for p, g in zip(params, gradients, strict=True)])
    run.step_as_is()
    agree(run)


def agree(run: Lockstep) -> None:
    for theirs, ours in zip(*run.params, strict=True):
        assert_same(ours, theirs, what="parameter")
        expected, actual = state_of(run.optimizers[0], theirs), state_of(run.ours, ours)
        assert set(actual) == set(expected)
        for name, value in expected.items():  # torch's may be a number, or sparse
            assert_same(actual[name], torch.as_tensor(value).to_dense().to(actual[name].dtype), what=name)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[tuple[int, ...]], Tensor]]] = {
    "coalesced": ((6, 3), lambda shape: coo([[1, 4]], shape).coalesce()),
    "unsorted": ((6, 3), lambda shape: coo([[4, 1]], shape)),
    "neighbours": ((6, 3), lambda shape: coo([[2, 3, 0, 1, 5]], shape)),
    "repeated": ((6, 3), lambda shape: coo([[4, 1, 4, 5, 4, 1]], shape)),
    "empty": ((6, 3), lambda shape: coo([[]], shape)),
    "every row": ((6, 3), lambda shape: coo([[0, 1, 2, 3, 4, 5]], shape)),
    "sparse throughout": ((6, 3), lambda shape: coo([[3, 0, 3, 5, 0], [2, 1, 2, 0, 0]], shape)),
    "sparse throughout and empty": ((6, 3), lambda shape: coo([[], []], shape)),
    "two dimensions of three": ((3, 4, 2), lambda shape: coo([[2, 0, 2, 0], [3, 1, 0, 1]], shape)),
    "1-d": ((7,), lambda shape: coo([[6, 0, 6]], shape)),
    "0-d": ((), lambda shape: coo(torch.zeros(0, 2), shape)),
    "rows of nothing": ((4, 0), lambda shape: coo([[2, 0]], shape)),
    "no rows": ((0, 3), lambda shape: coo([[]], shape)),
    "transposed indices": ((6, 3), lambda shape: coo(torch.tensor([[2, 1], [0, 0], [2, 1]]).t(), shape)),
    "expanded values": ((6, 3), lambda shape: coo([[5, 0]], shape, torch.randn(1, 1).double().expand(2, 3))),
    "transposed values": ((6, 3), lambda shape: coo([[5, 0]], shape, torch.randn(3, 2).double().t())),
}


@execution
@pytest.mark.parametrize("layout", LAYOUTS)
@each_class
def test_layouts(cls: Any, layout: str, compiled: bool) -> None:
    shape, make = LAYOUTS[layout]
    run = lockstep(cls, tensors([shape]), compiled)
    for _ in range(4):
        gradient = make(shape)
        before = gradient.clone()
        step(run, gradient)
        assert torch.equal(gradient._values(), before._values())  # it is only read
        assert torch.equal(gradient._indices(), before._indices())
        assert gradient._values()._version == 0
    if compiled:
        assert explain(run.ours).rebuilt == ["the first step"]


@execution
@pytest.mark.parametrize("switches", [{}, {"maximize": True}], ids=str)
@each_class
def test_many_parameters(cls: Any, switches: dict[str, Any], compiled: bool) -> None:
    """All layouts in one optimizer, beside dense gradients where the class takes them; some are missing."""
    dense = tensors([(5, 2), ()]) if cls.accepts_dense else []
    run = lockstep(
        cls, [*tensors(shape for shape, _ in LAYOUTS.values()), *dense], compiled, with_all_numbers(cls, switches)
    )
    for i in range(6):
        gradients = [*(make(shape) for shape, make in LAYOUTS.values()), *map(torch.randn_like, dense)]
        step(run, *(None if i and j % 4 == i % 4 else g for j, g in enumerate(gradients)))
    if compiled:
        (row,) = explain(run.ours)
        assert (row.execution, row.launches, row.tensors) == ("multi_tensor", 1, len(gradients))
        assert explain(run.ours).rebuilt == ["the first step"]


@execution
@each_that_takes_both
def test_dense_and_sparse_by_turns(cls: Any, compiled: bool) -> None:
    shape = (6, 3)
    run = lockstep(cls, tensors([shape, shape]), compiled)
    for i, rows in enumerate((None, 2, None, 8, 0, None, 1, None)):
        gradient = torch.randn(shape, dtype=torch.float64) if rows is None else random_rows(shape, rows)
        step(run, gradient, torch.randn_like(run.params[0][1]) if i % 3 else random_rows(shape, 3))
    if compiled:  # the first sparse gradient of a parameter makes a new plan; after that it may be either
        assert len(explain(run.ours).rebuilt) <= 3


@each_that_takes_both
def test_one_kernel_for_dense_and_sparse(cls: Any) -> None:
    compiled_optim.cache_clear()
    run = lockstep(cls, tensors([(6, 3), (6, 3)]), True)
    with assert_compiles(1):
        step(run, torch.randn(6, 3).double(), random_rows((6, 3), 4))
    (row,) = explain(run.ours)
    assert (row.execution, row.launches, row.tensors) == ("multi_tensor", 1, 2)


@each_class
def test_a_changing_number_of_rows_makes_neither_kernel_nor_plan(cls: Any) -> None:
    shape = (50, 4)
    run = lockstep(cls, tensors([shape]), True)
    step(run, random_rows(shape, 7))
    with assert_compiles(0):
        for rows in (0, 1, 50, 400, 3):
            step(run, random_rows(shape, rows))
            step(run, random_rows(shape, rows).coalesce())
    assert explain(run.ours).rebuilt == ["the first step"]


@each_class
def test_a_large_table(cls: Any) -> None:
    """Long enough for the launch to use threads, and to let go of the interpreter lock."""
    shape = (9_000, 64)
    run = lockstep(cls, tensors([shape]), True)
    step(run, coo(torch.randperm(9_000)[None], shape))


def trajectory(build: Any, initial: Tensor, gradients: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Parameter and state after steps in ``dtype``, in float64."""
    p = parameter(initial.to(dtype))
    optimizer = build([p])
    for g in gradients:
        p.grad = g.to(dtype)
        optimizer.step()
    return [t.detach().double() for t in (p, *(v for k, v in state_of(optimizer, p).items() if k != "step"))]


@execution
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_class
def test_no_less_exact_than_torch(cls: Any, dtype: torch.dtype, compiled: bool) -> None:
    def rms(t: Tensor) -> float:
        return t.square().mean().sqrt().nan_to_num(torch.inf).item()  # torch's SparseAdam divides by 0 in float16

    shape = (300, 16)
    initial = torch.randn(shape).to(dtype)
    gradients = [random_rows(shape, 200, dtype) for _ in range(10)]
    truth = trajectory(lambda params: oracle(cls)(params, lr=0.01), initial, gradients, torch.float64)
    theirs = trajectory(lambda params: oracle(cls)(params, lr=0.01), initial, gradients, dtype)
    ours = trajectory(lambda params: cls(params, lr=0.01, compiled=compiled), initial, gradients, dtype)
    for expected, reference, actual in zip(truth, theirs, ours, strict=True):
        assert actual.isfinite().all()
        # the floor: what rounding the truth itself once would cost
        floor = rms(expected.to(dtype).double() - expected)
        assert rms(actual - expected) <= 1.5 * max(rms(reference - expected), floor)


def poisoned(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Random numbers in ``rows``, and elsewhere signalling NaN, which any arithmetic turns into others."""
    values = torch.full(shape, 0x7FF0_0000_DEAD_BEEF, dtype=torch.int64).view(torch.float64)
    assert not torch.equal((values + 0).view(torch.int64), values.view(torch.int64))
    assert values.isnan().all()
    values[rows] = torch.rand(len(rows), *shape[1:], dtype=torch.float64)
    return values


@execution
@each_class
def test_other_rows_are_neither_read_nor_written(cls: Any, compiled: bool) -> None:
    shape, rows = (40, 5), torch.tensor([3, 4, 17, 39])
    others = torch.tensor([i for i in range(40) if i not in rows])
    run = lockstep(cls, [poisoned(rows, shape)], compiled)
    for optimizer, (p,) in zip(run.optimizers, run.params, strict=True):
        p.grad = coo([[]], shape)
        optimizer.step()  # makes the state
    names = [k for k in state_of(run.ours, run.params[1][0]) if k != "step"]
    state = {name: poisoned(rows, shape) for name in names}
    run.both(lambda optimizer, params: [optimizer.state[params[0]][k].copy_(v) for k, v in state.items()])
    (p,) = run.params[1]
    whole = [p.detach(), *(run.ours.state[p][name] for name in names)]
    before = [t.clone().view(torch.int64) for t in whole]
    for picked in ([17, 3, 39, 4], [4, 3], [39, 39, 3]):
        version = p._version
        step(run, coo([picked], shape))  # NaN agree with NaN, and touched rows with torch's
        assert p._version > version
    for tensor, old in zip(whole, before, strict=True):
        assert torch.equal(tensor.view(torch.int64)[others], old[others])
        assert tensor[rows].isfinite().all()
        assert not torch.equal(tensor.view(torch.int64)[rows], old[rows])


def allocated(optimizer: torch.optim.Optimizer) -> int:
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())


@execution
@each_class
@pytest.mark.usefixtures("lenient")
def test_a_step_allocates_nothing_of_the_size_of_the_parameter(cls: Any, compiled: bool) -> None:
    p = nn.Parameter(torch.zeros(1 << 16, 16))
    optimizer = cls([p], compiled=compiled)
    for rows in (3, 50):
        p.grad = random_rows(tuple(p.shape), rows, torch.float32)
        optimizer.step()
        assert allocated(optimizer) < (4096 if compiled else rows * 16 * 4 * 50)
    if cls.__name__ == "SGD":  # so that the test can fail
        optimizer.param_groups[0]["weight_decay"] = 0.1
        with pytest.warns(compiled_optim.CompileFallbackWarning) if compiled else torch.no_grad():
            assert allocated(optimizer) > p.nbytes


# ---- whole models


class Model(nn.Module):
    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 4, sparse=True, padding_idx=0)
        self.bags = nn.EmbeddingBag(20, 4, sparse=True, mode="sum")
        self.head = nn.Linear(4, 1) if dense else None

    def forward(self, words: Tensor, bags: Tensor) -> Tensor:
        features = self.words(words).sum(1) + self.bags(bags)
        return (self.head(features) if self.head else features).tanh().square().sum()


@execution
@each_class
def test_embeddings(cls: Any, compiled: bool) -> None:
    torch.set_default_dtype(torch.float64)
    models = [Model(cls.accepts_dense)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [
        oracle(cls)(models[0].parameters(), lr=0.05),
        cls(models[1].parameters(), lr=0.05, compiled=compiled),
    ]
    for i in range(8):
        batches = [(torch.randint(30, (6, 3)), torch.randint(20, (6, 2 + i % 3))) for _ in range(2)]
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            for batch in batches:  # two gradients accumulate
                model(*batch).backward()
            assert model.words.weight.grad.is_sparse
            assert model.bags.weight.grad.is_sparse
            optimizer.step()
        for theirs, ours in zip(*(m.parameters() for m in models), strict=True):
            assert_same(ours, theirs)
    if compiled:
        assert explain(optimizers[1]).rebuilt == ["the first step"]


@execution
@pytest.mark.parametrize("to_torch", [False, True], ids=["from torch", "to torch"])
@each_class
def test_checkpoints(cls: Any, to_torch: bool, compiled: bool) -> None:
    """Saved in the middle of training, and loaded by the other side."""
    shapes = [(6, 3), (9,)]
    run = lockstep(cls, tensors(shapes), compiled)
    for _ in range(3):
        step(run, *(random_rows(shape, 3) for shape in shapes))
    source, target = (1, 0) if to_torch else (0, 1)
    saved = run.optimizers[source].state_dict()
    reference = run.optimizers[0].state_dict()
    assert saved["state"].keys() == reference["state"].keys()
    for mine, theirs in zip(saved["state"].values(), reference["state"].values(), strict=True):
        assert {k: type(v) for k, v in mine.items()} == {k: type(v) for k, v in theirs.items()}
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    params = [parameter(p) for p in run.params[target]]
    options = {"lr": 0.9} if to_torch else {"lr": 0.9, "compiled": compiled}
    loaded = (oracle(cls) if to_torch else cls)(params, **options)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    pair = list(zip(run.params, run.optimizers, strict=True))
    pair[target] = (params, loaded)
    run.params, run.optimizers = (tuple(column) for column in zip(*pair, strict=True))
    for _ in range(3):
        step(run, *(random_rows(shape, 3) for shape in shapes))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager to compiled", "compiled to eager"])
@each_class
def test_copies_and_the_other_execution_go_on_alike(cls: Any, compiled: bool) -> None:
    shape = (6, 3)
    p = parameter(torch.randn(shape).double())
    first = cls([p], lr=0.1, compiled=compiled)
    for _ in range(3):
        p.grad = random_rows(shape, 4)
        first.step()
    second = copy.deepcopy(first)
    (q,) = second.param_groups[0]["params"]
    third = cls([r := parameter(p)], compiled=not compiled)
    third.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        p.grad = random_rows(shape, 4)
        q.grad, r.grad = p.grad.clone(), p.grad
        for optimizer in (first, second, third):
            optimizer.step()
        assert torch.equal(q, p)
        assert_same(r, p)
        for name, value in state_of(first, p).items():
            assert torch.equal(second.state[q][name], value)
            assert_same(third.state[r][name], value)


@execution
@each_class
def test_a_tensor_lr_and_a_scheduler(cls: Any, compiled: bool) -> None:
    run = Lockstep(
        lambda params: oracle(cls)(params, lr=0.1),
        lambda params: cls(params, lr=torch.tensor(0.1, dtype=torch.float64), compiled=compiled),
        tensors([(6, 3)]),
    )
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in run.optimizers]
    step(run, random_rows((6, 3), 4))
    with assert_compiles(0):
        for _ in range(4):
            for scheduler in schedulers:
                scheduler.step()
            step(run, random_rows((6, 3), 4))
    assert isinstance(run.ours.param_groups[0]["lr"], Tensor)


@pytest.mark.parametrize(
    "cls", [cls for cls in BOTH if "fused" in cls.rule.declaration.options], ids=lambda c: c.__name__
)
def test_scaled_gradients(cls: Any) -> None:
    """``fused=True`` divides by GradScaler's scale itself, or skips the step."""
    run = Lockstep(lambda params: oracle(cls)(params), lambda params: cls(params, fused=True), tensors([(6, 3)]))
    run.ours.grad_scale = torch.tensor(4.0)
    for overflow in (0.0, 1.0, 0.0):
        run.ours.found_inf = torch.tensor(overflow)
        gradient = random_rows((6, 3), 4)
        (theirs,), (ours,) = run.params
        theirs.grad, ours.grad = gradient, gradient * 4
        if overflow:
            run.ours.step()
        else:
            run.step_as_is()
        agree(run)
