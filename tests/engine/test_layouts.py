"""Sizes, strides, alignments and kinds of tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import Lockstep, state_of, tensors
from torch import Tensor

from compiled_optim import SGD, Adam, CompileFallbackWarning, explain

SIZES = [*range(131), *(2**k + d for k in range(8, 18) for d in (-1, 0, 1))]
SHAPES: list[tuple[int, ...]] = [(6, 5, 4, 3), (5, 7), (9,)]


def adam(initial: list[Tensor], compiled: bool = True) -> Lockstep:
    return Lockstep(torch.optim.Adam, lambda params: Adam(params, compiled=compiled), initial)


def momentum(initial: list[Tensor], compiled: bool = True) -> Lockstep:
    return Lockstep(
        lambda params: torch.optim.SGD(params, momentum=0.9),
        lambda params: SGD(params, momentum=0.9, compiled=compiled),
        initial,
    )


both_rules = pytest.mark.parametrize("rule", [adam, momentum])
execution = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def launches(optimizer: Any) -> int:
    rows = list(explain(optimizer))
    assert all(row.execution == "multi_tensor" for row in rows)
    return sum(row.launches or 0 for row in rows)


@execution
@both_rules
def test_every_size_in_one_step(rule: Any, compiled: bool) -> None:
    run = rule(tensors([(n,) for n in SIZES]), compiled)
    run.step(2)
    run.compare()
    if compiled:
        assert launches(run.ours) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run = adam(tensors([(0,), (20_001,), (), (0, 3), (1,), (63,), (17_000,), (0,)]))
        run.step(2)
        run.compare()
    finally:
        torch.set_num_threads(before)


@execution
@both_rules
@pytest.mark.parametrize(
    "shapes", [[()], [(), (1,), (1, 1, 1)], [(0,)], [(0,), (0, 3), (3, 0, 2)], [(0,), (5,), (3, 0, 2)]], ids=str
)
def test_zero_dimensional_and_empty(rule: Any, shapes: list[tuple[int, ...]], compiled: bool) -> None:
    run = rule(tensors(shapes), compiled)
    run.step(3)
    run.compare()


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def transposed(t: Tensor) -> Tensor:
    """The same values with the memory order reversed."""
    return t.permute(*range(t.dim() - 1, -1, -1)).contiguous().permute(*range(t.dim() - 1, -1, -1))


def sliced(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def expanded(t: Tensor) -> Tensor:
    return t[:1].clone().expand(t.shape)


def misaligned(t: Tensor) -> Tensor:
    """A copy that begins one byte after an aligned address."""
    raw = torch.empty(t.numel() * t.element_size() + 65, dtype=torch.uint8)
    offset = (1 - raw.data_ptr()) % 64
    view = torch.frombuffer(raw.numpy(), dtype=t.dtype, offset=offset, count=t.numel()) if t.numel() else t.flatten()
    return view.view(t.shape).copy_(t)


def off_by_one_element(t: Tensor) -> Tensor:
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [torch.clone, channels_last, transposed]
GRADIENTS = [*LAYOUTS, sliced, expanded, misaligned, off_by_one_element]


@execution
@both_rules
@pytest.mark.parametrize("of_gradient", GRADIENTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("of_parameter", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_of_parameter_and_gradient(of_parameter: Any, of_gradient: Any, rule: Any, compiled: bool) -> None:
    initial = [of_parameter(t) for t in tensors(SHAPES)]
    run = rule(initial, compiled)
    assert [p.stride() for p in run.params[1]] == [t.stride() for t in initial]
    for _ in range(2):
        gradients = [of_gradient(t) for t in tensors(SHAPES)]
        copies = [g.clone() for g in gradients]
        versions = [g._version for g in gradients]
        for params in run.params:
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
        run.step_as_is()
        run.compare()
        torch.testing.assert_close(gradients, copies, rtol=0, atol=0)
        assert [g._version for g in gradients] == versions
        assert all(p.grad is g for p, g in zip(run.params[1], gradients, strict=True))
    if compiled:
        assert launches(run.ours) == 1
        assert bool(run.ours._execution.plan.copied) == any(
            g.stride() != t.stride() for g, t in zip(gradients, initial, strict=True)
        )


def test_a_gradient_changes_its_layout_between_steps() -> None:
    run = adam(tensors(SHAPES))
    for layout in (torch.clone, transposed, sliced, torch.clone, expanded, channels_last):
        gradients = [layout(t) for t in tensors(SHAPES)]
        for params in run.params:
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
        run.step_as_is()
        run.compare()


@both_rules
def test_dimensions_of_one_need_no_copy(rule: Any) -> None:
    shapes = [(8, 4, 1, 1), (1, 4, 3, 3), (1, 6), (6, 1), (1, 1)]
    run = rule(tensors(shapes))
    gradients = tensors(shapes)
    odd = list(gradients)
    odd[0] = odd[0].as_strided((8, 4, 1, 1), (4, 1, 4, 4))  # as channels_last
    odd[2] = odd[2].as_strided((1, 6), (77, 1))
    odd[3] = odd[3].as_strided((6, 1), (1, 13))
    odd[4] = odd[4].as_strided((1, 1), (5, 0))
    assert sum(g.stride() != p.stride() for g, p in zip(odd, run.params[1], strict=True)) == 4
    for params in run.params:
        for p, g in zip(params, odd, strict=True):
            p.grad = g
    run.step_as_is()
    run.compare()
    assert run.ours._execution.plan.copied == []


@both_rules
def test_misaligned_parameters(rule: Any) -> None:
    run = rule(tensors([(131,), (7,), ()]))
    run.both(lambda _, params: [setattr(p, "data", misaligned(p.data)) for p in params])
    assert all(p.data_ptr() % 8 for p in run.params[1])
    run.step(3)
    run.compare()


@pytest.mark.parametrize(
    "lazy", [lambda t: t.conj().clone().conj(), lambda t: torch._neg_view(-t)], ids=["conj", "neg"]
)
@execution
def test_lazily_conjugated_and_negated_gradients(lazy: Any, compiled: bool) -> None:
    run = momentum(tensors(SHAPES, torch.complex128), compiled)
    for _ in range(2):
        gradients = [lazy(t) for t in tensors(SHAPES, torch.complex128)]
        assert all(g.is_conj() or g.is_neg() for g in gradients)
        for params, given in zip(
            run.params, ([g.resolve_conj().resolve_neg() for g in gradients], gradients), strict=True
        ):
            for p, g in zip(params, given, strict=True):
                p.grad = g
        run.step_as_is()
        run.compare()


def test_copy_on_write_parameter() -> None:
    """A lazy clone shares memory until one side is written."""
    initial = tensors([(70,)])
    run = adam(initial)
    clones = [torch._lazy_clone(p.detach()) for p in run.params[1]]
    before = [c.tolist() for c in clones]
    run.step(2)
    run.compare()
    assert [c.tolist() for c in clones] == before


@pytest.mark.usefixtures("lenient")
@both_rules
def test_meta_parameters(rule: Any) -> None:
    run = rule([torch.empty(3, 4, device="meta"), torch.empty((), device="meta")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileFallbackWarning)
        run.give([torch.empty(3, 4, device="meta"), torch.empty((), device="meta")])
        run.step_as_is()
        run.step_as_is()
    for theirs, ours in zip(*run.params, strict=True):
        expected, actual = state_of(run.optimizers[0], theirs), state_of(run.ours, ours)
        assert {k: (v.shape, v.dtype, v.device) for k, v in actual.items()} == {
            k: (v.shape, v.dtype, v.device) for k, v in expected.items()
        }
    assert all(row.execution == "eager" for row in explain(run.ours))


@pytest.mark.usefixtures("lenient")
@execution
def test_inference_tensors(compiled: bool) -> None:
    with torch.inference_mode():
        initial = tensors([(5,), (2, 3)])
        run = momentum(initial, compiled)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompileFallbackWarning)
            run.step(2)
        run.compare()
    for optimizer in run.optimizers:
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            optimizer.step()


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """9 GB: indices that are 32 bits wide somewhere would miss or repeat elements."""
    n = 2**31 + 1001
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    p.grad = torch.zeros(n, dtype=torch.bfloat16)
    marked = torch.tensor([0, 1, n // 2, 2**31 - 1, 2**31, 2**31 + 1, n - 1])
    p.grad[marked] = torch.tensor([1, 2, 3, 4, 5, 6, 7], dtype=torch.bfloat16)
    small = SGD([q := torch.nn.Parameter(torch.ones(7, dtype=torch.bfloat16))], lr=0.125)
    q.grad = torch.tensor([1, 2, 3, 4, 5, 6, 7], dtype=torch.bfloat16)
    small.step()
    SGD([p], lr=0.125, compiled=True).step()
    torch.testing.assert_close(p.detach()[marked], q.detach(), rtol=0, atol=0)
    changed = sum(chunk.ne(1).count_nonzero().item() for chunk in p.detach().split(2**26))
    assert changed == len(marked)
