"""Tensors that no kernel takes: which path they take instead, and that a refusal comes before the first write."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from beside_torch import Lockstep, tensors
from torch import Tensor

from compiled_optim import SGD, Adam, CompileError, CompileFallbackWarning, explain
from compiled_optim._engine.executions import traced_lists

SHAPES: list[tuple[int, ...]] = [(5, 7), (3, 4, 2, 2), (), (131,)]
lenient = pytest.mark.usefixtures("lenient")


def adam(initial: list[Tensor]) -> Lockstep:
    return Lockstep(torch.optim.Adam, lambda params: Adam(params, compiled=True), initial)


def sgd(initial: list[Tensor], **options: Any) -> Lockstep:
    return Lockstep(
        lambda params: torch.optim.SGD(params, **options),
        lambda params: SGD(params, **options, compiled=True),
        initial,
    )


def expanded(t: Tensor) -> Tensor:
    return t[:1].clone().expand(t.shape)


def non_dense(t: Tensor) -> Tensor:
    return torch.zeros(*t.shape[:-1], t.shape[-1] * 2, dtype=t.dtype)[..., ::2].copy_(t)


def with_odd_one(layout: Callable[[Tensor], Tensor], **options: Any) -> Lockstep:
    """Three parameters, the second of which has this layout."""
    run = sgd(tensors([(5, 6), (5, 6), (4,)]), momentum=0.9, **options)
    run.both(lambda _, params: setattr(params[1], "data", layout(params[1].data)))
    run.give(tensors([(5, 6), (5, 6), (4,)]))
    return run


@lenient
def test_only_a_parameter_with_gaps_steps_eagerly() -> None:
    run = with_odd_one(non_dense)
    assert not run.params[1][1].is_contiguous()
    with pytest.warns(CompileFallbackWarning, match=r"shape \(5, 6\).*overlap or leave gaps") as caught:
        run.step()
    assert len(caught) == 1
    run.step(2)  # warns no more
    run.compare()
    assert {row.execution: row.tensors for row in explain(run.ours)} == {"multi_tensor": 2, "eager": 1}


def test_an_overlapping_parameter_is_an_error_as_in_torch() -> None:
    run = with_odd_one(expanded)
    before = [p.detach().clone() for p in run.params[1]]
    for optimizer in run.optimizers:
        with pytest.raises(RuntimeError, match="single memory location"):
            optimizer.step()
    torch.testing.assert_close([p.detach() for p in run.params[1]], before, rtol=0, atol=0)
    assert not run.ours.state


def test_strict_mode_refuses_before_the_first_write() -> None:
    run = with_odd_one(non_dense)
    before = [p.detach().clone() for p in run.params[1]]
    for _ in range(2):  # a second attempt must not pass either
        with pytest.raises(CompileError, match="COMPILED_OPTIM_STRICT"):
            run.ours.step()
        torch.testing.assert_close([p.detach() for p in run.params[1]], before, rtol=0, atol=0)
        assert not run.ours.state
    assert run.params[1][0]._version == run.params[0][0]._version


def test_strict_refusal_then_repair() -> None:
    """A refused step must not count as the first one: SGD's first gradient enters the momentum undampened."""
    run = with_odd_one(non_dense, dampening=0.5)
    with pytest.raises(CompileError):
        run.ours.step()
    run.both(lambda _, params: setattr(params[1], "data", params[1].data.contiguous()))
    run.step(3)
    run.compare()


@lenient
@pytest.mark.filterwarnings("ignore::compiled_optim.CompileFallbackWarning")
def test_what_stepped_eagerly_is_taken_by_a_kernel_again() -> None:
    """And is stepped once by the plan that finds it so."""
    run = with_odd_one(non_dense)
    run.step(2)
    run.both(lambda optimizer, _: optimizer.param_groups[0].update(params=optimizer.param_groups[0]["params"][:2]))
    run.both(lambda _, params: setattr(params[1], "data", params[1].data.contiguous()))
    run.both(lambda optimizer, params: optimizer.state[params[1]].update(momentum_buffer=torch.ones(5, 6).double()))
    run.step()
    run.compare()
    assert not run.ours._execution.plan.elsewhere


@lenient
def test_data_swapped_for_other_strides() -> None:
    """State in another layout than its parameter: updated eagerly, and right."""

    def change(_: Any, params: list[Any]) -> None:
        params[1].data = params[1].data.contiguous(memory_format=torch.channels_last)

    run = adam(tensors(SHAPES))
    run.step(2)
    run.both(change)
    with pytest.warns(CompileFallbackWarning, match="another layout or device"):
        run.step()
    run.step()
    run.compare()
    assert {row.execution: row.tensors for row in explain(run.ours)} == {"multi_tensor": 3, "eager": 1}


def test_data_swapped_for_another_shape_without_state() -> None:
    """As good as a new parameter."""
    run = sgd(tensors(SHAPES))
    run.step()
    for theirs, ours in zip(*run.params, strict=True):
        theirs.grad = ours.grad = None
        theirs.data = torch.randn(3, 11, dtype=torch.float64)
        ours.data = theirs.data.clone()
    run.step(2)
    run.compare()


def test_data_swapped_for_another_shape_over_old_state() -> None:
    run = adam(tensors(SHAPES))
    run.step()
    p = run.params[1][0]
    p.grad, p.data = None, torch.randn(11, 3, dtype=torch.float64)
    p.grad = torch.randn_like(p)
    before = [t.detach().clone() for t in run.params[1]]
    with pytest.raises(
        RuntimeError, match=r"Adam: state 'exp_avg' .*shape \(11, 3\) at index 0 of .* 0 .*got \(5, 7\)"
    ):
        run.ours.step()
    torch.testing.assert_close([t.detach() for t in run.params[1]], before, rtol=0, atol=0)
    assert all(run.ours.state[t]["step"] == 1 for t in run.params[1])


def test_data_swapped_for_another_dtype_under_an_old_gradient() -> None:
    """Nothing but the parameter itself tells of it."""
    run = sgd(tensors(SHAPES))
    run.step()
    run.both(lambda _, params: [setattr(p, "data", p.data.float()) for p in params])
    assert run.params[1][0].grad.dtype == torch.float64
    run.step_as_is()
    run.compare(1e-6)


@lenient
def test_data_swapped_for_one_with_gaps_like_the_gradient() -> None:
    """Their strides agree, and a kernel that walked the memory would write into the gaps."""
    run = sgd(tensors([(5, 6)]))
    run.step()
    run.both(lambda _, params: setattr(params[0], "data", non_dense(params[0].data)))
    gradient = non_dense(torch.ones(5, 6, dtype=torch.float64))
    gradient._base.masked_fill_(gradient._base == 0, torch.nan)
    for (p,) in run.params:
        p.grad = gradient
    run.optimizers[0].step()
    with pytest.warns(CompileFallbackWarning, match="overlap or leave gaps"):
        run.ours.step()
    run.compare()
    whole = run.params[1][0].detach().as_strided((5, 12), (12, 1))
    assert whole[:, 1::2].count_nonzero() == 0


def test_a_sparse_gradient_that_is_not_taken_changes_nothing() -> None:
    run = adam(tensors([(4, 3), (4, 3)]))
    run.step(2)
    before = [p.detach().clone() for p in run.params[1]]
    run.give(tensors([(4, 3), (4, 3)]))
    run.both(lambda _, params: setattr(params[1], "grad", params[1].grad.to_sparse()))
    for optimizer, params in zip(run.optimizers, run.params, strict=True):
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            optimizer.step()
        torch.testing.assert_close([p.detach() for p in params], before, rtol=1e-12, atol=1e-14)
        assert [optimizer.state[p]["step"].item() for p in params] == [2, 2]


def with_copied_gradients(**options: Any) -> Lockstep:
    """One whose gradients were copied in its first step, and of which the first parameter's is now sparse."""
    shapes = [(4, 3), (5, 2)]
    run = sgd(tensors(shapes), **options)
    run.both(lambda _, params: [setattr(p, "grad", torch.ones(p.shape[::-1], dtype=p.dtype).mT) for p in params])
    run.step_as_is()
    assert len(run.ours._execution.plan.copied) == 2
    run.give(tensors(shapes))
    run.both(lambda _, params: setattr(params[0], "grad", params[0].grad.to_sparse(1)))
    return run


def test_a_copied_gradient_becomes_sparse() -> None:
    run = with_copied_gradients()
    run.step_as_is()
    assert len(run.ours._execution.plan.sparse) == 1
    run.step()
    run.compare()


@lenient
def test_a_copied_gradient_becomes_sparse_under_options_that_update_every_row() -> None:
    run = with_copied_gradients(momentum=0.9)
    run.optimizers[0].step()
    with pytest.warns(CompileFallbackWarning, match="sparse and these options update every row"):
        run.ours.step()
    run.step()
    run.compare()


def test_a_refused_sparse_gradient_makes_no_state_in_the_foreach_lowering() -> None:
    optimizer = SGD([p := torch.nn.Parameter(torch.ones(4, 3))], momentum=0.9, compiled="foreach")
    p.grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(CompileError, match="sparse"):
        optimizer.step()
    assert not optimizer.state


@pytest.fixture
def graphs_that_fail(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of the graphs that will not compile; the others run eagerly."""
    failing: list[int] = []
    started = itertools.count()

    def stand_in(rule: Any, parts: Any) -> Callable[..., None]:
        number = next(started)

        def graph(*given: Any) -> None:
            if number in failing:
                raise ValueError("planted")
            traced_lists.update_parts(rule, parts, *given)

        return graph

    traced_lists.forget()
    monkeypatch.setattr(traced_lists, "_compile", stand_in)
    yield failing
    traced_lists.forget()


def two_lists(initial: list[Tensor]) -> Lockstep:
    """Two lists, for they have different switches; a first step differs from later ones (dampening)."""
    options = {"momentum": 0.9, "dampening": 0.5}

    def groups(params: Any) -> list[dict[str, Any]]:
        return [{"params": params[:1]}, {"params": params[1:], "nesterov": True, "dampening": 0.0}]

    return Lockstep(
        lambda params: torch.optim.SGD(groups(params), **options),
        lambda params: SGD(groups(params), **options, compiled="foreach"),
        initial,
    )


def test_foreach_has_one_graph_for_each_pattern_of_gradients(graphs_that_fail: list[int]) -> None:
    """And one more where step counts have come to differ, whichever do; none for other values of a hyperparameter."""
    assert not graphs_that_fail

    def groups(params: Any) -> list[dict[str, Any]]:
        return [{"params": params[:1]}, {"params": params[1:], "amsgrad": True}]

    run = Lockstep(
        lambda params: torch.optim.Adam(groups(params)),
        lambda params: Adam(groups(params), compiled="foreach"),
        tensors([(5,), (6,), (7,)]),
    )
    origins = []
    for step, missing in enumerate([(), (2,), (), (), (2,), (), ()]):
        run.both(lambda optimizer, _: [group.update(lr=0.1 / (step + 1)) for group in optimizer.param_groups])  # noqa: B023
        run.step(missing=missing)
        (row,) = explain(run.ours)
        origins.append(row.origin)
    run.compare()
    assert origins == [*["compiled"] * 3, *["memory"] * 4]


@lenient
def test_the_step_of_a_failed_foreach_graph_is_eager(graphs_that_fail: list[int]) -> None:
    graphs_that_fail.append(0)
    run = two_lists(tensors([(5,), (6,)]))
    with pytest.warns(CompileFallbackWarning, match=r"torch\.compile failed: planted"):
        run.step()
    run.step()
    run.compare()


def test_a_failed_foreach_graph_changes_nothing_in_strict_mode(graphs_that_fail: list[int]) -> None:
    graphs_that_fail.append(0)
    run = two_lists(initial := tensors([(5,), (6,)]))
    with pytest.raises(CompileError, match="planted"):
        run.step()
    assert not run.ours.state
    torch.testing.assert_close([p.detach() for p in run.params[1]], initial, rtol=0, atol=0)


@lenient
def test_what_a_failed_foreach_graph_left_is_finished_eagerly(graphs_that_fail: list[int]) -> None:
    """The first of two that share memory, each of which has a graph, is not stepped again."""
    graphs_that_fail.append(1)
    p = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    stock = torch.nn.Parameter(p.detach().clone())
    pairs = [(t, torch.nn.Parameter(t.detach()[:3])) for t in (p, stock)]
    mine, theirs = SGD(pairs[0], momentum=0.9, compiled="foreach"), torch.optim.SGD(pairs[1], momentum=0.9)
    for pair in pairs:
        for i, t in enumerate(pair):
            t.grad = torch.full_like(t, i + 1.0)
    with pytest.warns(CompileFallbackWarning, match=r"torch\.compile failed: planted"):
        mine.step()
    theirs.step()
    mine.step()
    theirs.step()
    torch.testing.assert_close(p, stock)
