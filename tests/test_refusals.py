"""Tensors that no kernel takes: which path they take instead, and that a refusal comes before the first write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lockstep import Lockstep, tensors
from torch import Tensor

from compiled_optim import SGD, Adam, CompileError, CompileFallbackWarning, explain
from compiled_optim._engine.executions import foreach

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


@lenient
@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_failed_foreach_graph_is_finished_eagerly(monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """Lists that were stepped are not stepped again, and a first step stays a first step (dampening)."""
    options = {"momentum": 0.9, "dampening": 0.5}
    run = Lockstep(
        lambda params: torch.optim.SGD([{"params": [p]} for p in params], **options),
        lambda params: SGD([{"params": [p]} for p in params], **options, compiled="foreach"),
        tensors([(5,), (6,)]),
    )
    calls = iter(range(9))

    def stand_in(algorithm: Any, on: Any, buffers: Any, names: Any) -> Callable[..., None]:
        def graph(params: Any, grads: Any, state: Any, scalars: Any) -> None:
            if next(calls) == fails_at:
                raise ValueError("planted")
            values = {k: [v] for k, v in zip(names, scalars, strict=True)}
            foreach.update_lists(algorithm, on, params, grads, dict(zip(buffers, state, strict=True)), values)

        return graph

    foreach.forget()
    monkeypatch.setattr(foreach, "_compile", stand_in)
    with pytest.warns(CompileFallbackWarning, match=r"torch\.compile failed: planted"):
        run.step()
    run.compare()
    assert next(calls) == fails_at + 1
    foreach.forget()
