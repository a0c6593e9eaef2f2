"""Rules that reduce, compiled: cut into stages, and equal to the rule on whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_torch import parameter, set_gradients
from cases import oracle
from torch import Tensor

from compiled_optim import Adafactor, CompileError, Muon, Optimizer, explain
from compiled_optim._engine.values import lerp, maximum
from compiled_optim.declare import batched, buffer, counter, mean, number, of_shape
from compiled_optim.testing import assert_compiles

# Matrices of few elements and of many, of short rows and of long, alone and in stacks; parts of them go to threads.
MATRICES = [(5, 7), (1, 1), (6, 1), (1, 9), (300, 500), (70, 3000), (513, 2049)]
STACKS = [(4, 3, 3, 3), (2, 3, 1, 1), (512, 64, 3, 3), (3, 300, 700), (40, 1, 900), (2, 3, 5, 1), (300000, 1, 1)]
VECTORS = [(3,), (), (1,), (200000,)]
EMPTY = [(0, 3), (3, 0, 2), (0,)]


class Trusted(Optimizer):
    """Momentum, scaled by the ratio of norms (You et al. 2020, arXiv:1904.00962), on any shape."""

    elementwise = False
    lr: float = number(default=0.1, low=0)
    step_count = counter()
    velocity = buffer()

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr, "weight": 0.1 + 0.01 * step}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        s.velocity = lerp(s.velocity, g, k.weight)
        ratio = mean(p * p).sqrt() / maximum(mean(s.velocity * s.velocity).sqrt(), 1e-6)
        return p - s.velocity * ratio * (k.lr * of_shape(lambda shape: 1 + len(shape), p))


class TwiceBatched(Optimizer):
    """Functions of whole tensors one after another, given a scalar and a number, and means before and after."""

    elementwise = False
    lr: float = number(default=0.1, low=0)
    rows = buffer(of="matrices", mean_over=-1)

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr, "half": 0.5}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        first = batched(reversed_rows, g * 2 + mean(g * g), k.lr)
        second = batched(reversed_rows, first + p, 3.0, of_list=all_reversed)
        s.rows = lerp(s.rows, mean(second, -1), 0.25)
        return p - second * k.half - s.rows + mean(mean(second, -1), -2)


def reversed_rows(t: Tensor, factor: float) -> Tensor:
    if factor == 3 and not t.isfinite().all():
        raise MemoryError("no more")
    return t.flip(-2) * factor


def all_reversed(tensors: list[Tensor], factor: float) -> list[Tensor]:
    return [reversed_rows(t, factor) for t in tensors]


def pair(
    cls: Any, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[list[Any], list[Any], Any, Any]:
    """Equal parameters, and an eager and a compiled optimizer of them."""
    values = [torch.randn(shape, dtype=dtype) for shape in shapes]
    ours, theirs = ([parameter(v) for v in values] for _ in range(2))
    return ours, theirs, cls(ours, compiled=True, **options), cls(theirs, **options)


def steps(n: int, ours: list[Any], theirs: list[Any], compiled: Any, eager: Any) -> None:
    for _ in range(n):
        set_gradients(ours, theirs)
        compiled.step()
        eager.step()


def assert_alike(ours: list[Any], theirs: list[Any], compiled: Any, eager: Any, rtol: float = 1e-12) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)
        assert list(compiled.state[p]) == list(eager.state[q])
        for name, value in compiled.state[p].items():
            torch.testing.assert_close(value, eager.state[q][name], rtol=rtol, atol=rtol, msg=f"{name} of {p.shape}")


CASES = [
    (Adafactor, {"weight_decay": 0.1}, MATRICES + STACKS + VECTORS),
    (Muon, {"lr": 0.1}, MATRICES),
    (Trusted, {}, MATRICES + STACKS + VECTORS),
    (TwiceBatched, {}, MATRICES + STACKS),
]


@pytest.mark.parametrize(("cls", "options", "shapes"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_compiled_step_is_the_rule_on_whole_tensors(
    cls: Any, options: dict[str, Any], shapes: list[tuple[int, ...]]
) -> None:
    run = pair(cls, shapes, **options)
    steps(3, *run)
    assert_alike(*run)
    rows = explain(run[2]).rows
    assert {row.execution for row in rows} == {"multi_tensor"}
    assert sum(row.tensors for row in rows) == len(shapes)


def test_empty_tensors_stay_as_they_are() -> None:
    ours, theirs, compiled, eager = pair(Adafactor, [*EMPTY, (2, 3)])
    steps(2, ours, theirs, compiled, eager)
    assert_alike(ours, theirs, compiled, eager)
    assert [p.isfinite().all().item() for p in ours] == [True] * 4


def test_the_launches_of_a_step_are_one_and_one_for_each_batch() -> None:
    for cls, shapes, expected in ((Adafactor, [(3, 4), (5,)], [1, 1]), (Muon, [(3, 4), (4, 3)], [2])):
        run = pair(cls, shapes)
        steps(1, *run)
        assert [row.launches for row in explain(run[2])] == expected
    run = pair(TwiceBatched, [(3, 4)])
    steps(1, *run)
    assert [row.launches for row in explain(run[2])] == [3]


def test_kernels_are_compiled_in_the_first_step_only() -> None:
    run = pair(Adafactor, [(3, 4), (5,), (2, 3, 3)], torch.float32, weight_decay=0.1)
    with assert_compiles(kernels=2):  # of matrices, and of vectors
        steps(1, *run)
    run[2].param_groups[0].update(lr=0.5, weight_decay=0.3, eps=(1e-4, 0.1), d=2.0, beta2_decay=-0.5)
    more = parameter(torch.randn(7, 7))
    run[2].add_param_group({"params": [more], "lr": 0.1})
    more.grad = torch.randn(7, 7)
    with assert_compiles(0):
        run[2].step()
        steps(1, *pair(Adafactor, [(40, 30), (6,)], torch.float32, weight_decay=0.2))


def test_the_number_of_threads_changes_no_bit() -> None:
    """Sums are cut by the shape of a tensor, not by the threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            torch.manual_seed(1)
            ours, theirs, compiled, eager = pair(Adafactor, [(513, 2049), (300000, 1, 1), (70, 3)], torch.float32)
            steps(2, ours, theirs, compiled, eager)
            results.append([p.detach() for p in ours])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrower_dtypes_are_as_exact_as_torch(dtype: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(60, 70), (9,), (8, 4, 3, 3)]
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    truth, ours, theirs = ([parameter(v.to(d)) for v in values] for d in (torch.float64, dtype, dtype))
    eps = {"eps": (1e-3, 1e-3)}  # that of the dtype is another one for the truth
    optimizers = [
        oracle(Adafactor)(truth, **eps),
        Adafactor(ours, compiled=True, **eps),
        oracle(Adafactor)(theirs, **eps),
    ]
    for _ in range(5):
        for exact, p, q in zip(truth, ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            exact.grad, q.grad = p.grad.double(), p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for exact, p, q in zip(truth, ours, theirs, strict=True):
        error, reference = ((t.double() - exact).abs().max().item() for t in (p, q))
        assert error <= 1.5 * reference + torch.finfo(dtype).eps * exact.abs().max().item() / 4


def test_gradients_of_another_dtype_or_layout_are_read() -> None:
    ours, theirs, compiled, eager = pair(Adafactor, [(6, 4), (8, 3)], torch.float32)
    for p in (*ours, *theirs):
        p.grad_dtype = None
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn(p.shape[::-1], dtype=torch.float64).T
        q.grad = p.grad.float()
    compiled.step()
    eager.step()
    assert_alike(ours, theirs, compiled, eager, rtol=1e-5)


def test_what_no_kernel_takes_is_told_and_updated(lenient: None) -> None:
    ours, theirs, compiled, eager = pair(Adafactor, [(4, 6, 2, 2), (5, 3)])
    for params, optimizer in ((ours, compiled), (theirs, eager)):
        optimizer.param_groups[0]["params"][0].data = params[0].data.to(memory_format=torch.channels_last)
    with pytest.warns(UserWarning, match=r"a parameter of shape \(4, 6, 2, 2\) is updated eagerly.*not contiguous"):
        steps(1, ours, theirs, compiled, eager)
    steps(1, ours, theirs, compiled, eager)
    assert_alike(ours, theirs, compiled, eager)
    assert {row.execution for row in explain(compiled)} == {"multi_tensor", "eager"}


def test_a_function_of_batches_that_raises_leaves_all_as_it_was() -> None:
    ours, theirs, compiled, eager = pair(TwiceBatched, [(3, 4), (2, 5)])
    steps(1, ours, theirs, compiled, eager)
    before = [t.detach().clone() for p in ours for t in (p, compiled.state[p]["rows"])]
    set_gradients(ours, theirs)
    ours[1].grad[0, 0] = torch.inf
    with pytest.raises(MemoryError, match="no more"):
        compiled.step()
    assert all(map(torch.equal, before, [t for p in ours for t in (p, compiled.state[p]["rows"])]))


class KeepsRows(TwiceBatched):
    """Row means from before a batch would have to be kept until after it."""

    lr: float = number(default=0.1, low=0)

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        s.rows = mean(g, -1)
        return p - batched(reversed_rows, g, k.lr) * s.rows


class Branches(Trusted):
    """What numbers are worth is not known when the rule is recorded."""

    lr: float = number(default=0.1, low=0)

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - g if mean(g) > 0 else p


class Misshapen(Trusted):
    lr: float = number(default=0.1, low=0)

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return mean(p, -1)


class Many(Trusted):
    """More rows than a loop over elements can be given at once."""

    lr: float = number(default=0.1, low=0)

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        for i in range(13):
            p = p - mean(g * (i + 2), -1)
        return p


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Many, "too many values"),
        (KeepsRows, "means over rows or columns"),
        (Branches, "cannot branch"),
        (Misshapen, "another shape"),
    ],
)
def test_what_cannot_be_cut_is_told(cls: Any, message: str) -> None:
    ours, _, compiled, _ = pair(cls, [(3, 4)])
    before = ours[0].detach().clone()
    ours[0].grad = torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(CompileError, match=f"{message}.*foreach"):
        compiled.step()
    assert torch.equal(ours[0], before)
    assert not compiled.state


class Shortened(Trusted):
    """A function of whole tensors that gives back others."""

    lr: float = number(default=0.1, low=0)

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - batched(transposed, g)


def transposed(t: Tensor) -> Tensor:
    return t.T


def test_a_batch_of_other_shapes_is_an_error() -> None:
    ours, _, compiled, _ = pair(Shortened, [(3, 4)])
    before = ours[0].detach().clone()
    ours[0].grad = torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"Shortened: a batch must keep its shapes \[\(3, 4\)\], got \[\(4, 3\)\]"):
        compiled.step()
    assert torch.equal(ours[0], before)


class Wrapped(torch.Tensor):
    """A subclass, whose memory nobody may reach for."""


def test_gradients_of_a_subclass_and_negated_ones_are_no_plain_memory(lenient: None) -> None:
    ours, theirs, compiled, eager = pair(Adafactor, [(3, 4), (5, 2)])
    values = torch.randn(3, 4, dtype=torch.complex128)
    for params in (ours, theirs):
        params[0].grad = values.conj().imag  # negated when it is read
        params[1].grad = torch.ones(5, 2, dtype=torch.float64).as_subclass(Wrapped)
    assert ours[0].grad.is_neg()
    with pytest.warns(UserWarning, match="its gradient is a Wrapped"):
        compiled.step()
    eager.step()
    assert_alike(ours, theirs, compiled, eager)
