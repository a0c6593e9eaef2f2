"""Steps during the backward pass do what ordinary steps do, and free gradients on the way."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from beside_torch import MATRICES, assert_equal, both, executions, parameter, tensors
from cases import CLASSES, KINDS, gradient, oracle, rich_options, tolerance
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import compiled_optim
from compiled_optim import SGD, Adam, AdamW, explain, lr_scheduler
from compiled_optim._engine.torch_private import version

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
WIDTH = 4


def twins(count: int = 4) -> tuple[list[Any], list[Any]]:
    """Equal parameters for two optimizers."""
    values = tensors([(WIDTH,)] * count)
    return [parameter(v) for v in values], [parameter(v) for v in values]


def product(params: Sequence[Any], x: Any = 1.0) -> Tensor:
    """A loss whose gradients arrive from the last parameter to the first."""
    for p in params:
        x = x * (p + 1.5)
    return x.sum()  # type: ignore[no-any-return]


def train(optimizer: Any, loss: Callable[[int], Tensor], iterations: int = 4, micro_steps: int = 1) -> None:
    for i in range(iterations):
        for _ in range(micro_steps):
            loss(i).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_exact(ours: Any, ordinary: Any) -> None:
    """Equal parameters and state, bit for bit, of two optimizers."""
    for mine, theirs in zip(ours.param_groups, ordinary.param_groups, strict=True):
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            assert torch.equal(p, q)
            state, expected = ours.state.get(p, {}), ordinary.state.get(q, {})
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in state)


# ---- the same as ordinary steps


def compare(cls: Any, options: dict[str, Any], compiled: bool, block_elements: int) -> Any:
    """Three iterations of ours in backward, ours, and torch's, on the same gradients."""
    values = tensors(MATRICES)
    lists = [[parameter(v) for v in values] for _ in range(3)]
    ours, ordinary = (cls(params, **options, compiled=compiled) for params in lists[:2])
    stock = oracle(cls)(lists[2], **options)
    ours.step_in_backward(block_elements=block_elements)
    for i in range(3):
        grads = [gradient(cls, v) for v in values]
        for optimizer, params in zip((ours, ordinary, stock), lists, strict=True):
            # the last parameter has no gradient in the second iteration
            torch.autograd.backward(params[: 3 - i % 2], [g.clone() for g in grads[: 3 - i % 2]])
            assert optimizer is not ours or [p.grad for p in params] == [None] * 3
            optimizer.step()
            optimizer.zero_grad()
    assert_exact(ours, ordinary)
    for p, q in zip(lists[0], lists[2], strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance(cls), atol=tolerance(cls))
    return ours


@every_class
@pytest.mark.parametrize("block_elements", [1, 15, 1000])
def test_eager_steps_in_backward_are_ordinary_steps(cls: Any, block_elements: int) -> None:
    optimizer = compare(cls, {}, False, block_elements)
    assert set(executions(optimizer)) == {"eager"}


@pytest.mark.parametrize("cls", KINDS, ids=lambda c: c.__name__)
def test_compiled_steps_in_backward_are_ordinary_steps(cls: Any) -> None:
    optimizer = compare(cls, {}, True, 15)
    assert set(executions(optimizer)) == {"multi_tensor"}


def test_all_options_at_once() -> None:
    compare(AdamW, rich_options(AdamW), True, 15)


@both
def test_averages_masters_and_moments_in_other_dtypes(compiled: bool) -> None:
    ours, theirs = ([parameter(p.bfloat16()) for p in params] for params in twins())
    options: dict[str, Any] = {"ema_decay": lambda t: t / (t + 1), "state_dtype": torch.float32, "master_weights": True}
    mine, ordinary = (Adam(params, lr=0.1, compiled=compiled, **options) for params in (ours, theirs))
    mine.step_in_backward(block_elements=2 * WIDTH)
    train(mine, lambda i: product(ours))
    train(ordinary, lambda i: product(theirs))
    assert_exact(mine, ordinary)
    with mine.averaged(), pytest.raises(RuntimeError, match=r"within averaged\(\)"):
        product(ours).backward()


@both
def test_gradients_are_accumulated_over_micro_steps(compiled: bool) -> None:
    ours, theirs = twins()
    mine, ordinary = (Adam(params, lr=0.1, compiled=compiled) for params in (ours, theirs))
    mine.step_in_backward(micro_steps=3, block_elements=WIDTH)
    present: list[int] = []

    def loss(i: int) -> Tensor:
        present.append(sum(p.grad is not None for p in ours))
        # the last parameter takes part in the second iteration only
        return product(ours if i == 1 else ours[:3])

    train(mine, loss, micro_steps=3)
    train(ordinary, lambda i: product(theirs if i == 1 else theirs[:3]), micro_steps=3)
    assert_exact(mine, ordinary)
    assert present == [0, 3, 3, 0, 4, 4, 0, 3, 3, 0, 3, 3]


@both
def test_what_was_accumulated_less_often_is_left_to_step(compiled: bool) -> None:
    """As at the end of an epoch."""
    ours, theirs = twins()
    mine, ordinary = (Adam(params, lr=0.1, compiled=compiled) for params in (ours, theirs))
    mine.step_in_backward(micro_steps=2)
    for micro_steps in (2, 1, 2):
        train(mine, lambda i: product(ours), 1, micro_steps)
        train(ordinary, lambda i: product(theirs), 1, micro_steps)
    assert_exact(mine, ordinary)


@both
def test_a_parameter_that_is_used_twice_is_updated_once(compiled: bool) -> None:
    ours, theirs = twins()
    mine, ordinary = (Adam(params, lr=0.1, compiled=compiled) for params in (ours, theirs))
    mine.step_in_backward(block_elements=1)
    train(mine, lambda i: product([*ours, *ours]))
    train(ordinary, lambda i: product([*theirs, *theirs]))
    assert_exact(mine, ordinary)
    assert all(mine.state[p]["step"] == 4 for p in ours)


@both
def test_gradients_in_another_order(compiled: bool) -> None:
    """Blocks are split when those that have arrived would hold too many gradients."""
    ours, theirs = twins(8)
    orders = [range(8), range(7, -1, -1), [0, 7, 1, 6, 2, 5, 3, 4], [1, 3, 5, 7], range(8)]
    mine, ordinary = (Adam(params, lr=0.1, compiled=compiled) for params in (ours, theirs))
    mine.step_in_backward(block_elements=2 * WIDTH)
    train(mine, lambda i: product([ours[k] for k in orders[i]]), len(orders))
    train(ordinary, lambda i: product([theirs[k] for k in orders[i]]), len(orders))
    assert_exact(mine, ordinary)


@both
def test_param_groups_options_and_schedules(compiled: bool) -> None:
    """Options are read when they are used, and an attached schedule moves once per iteration."""
    runs = []
    for params in twins():
        groups = [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "lr": 0.2}]
        optimizer: Any = AdamW(groups, lr=0.1, compiled=compiled)
        optimizer.attach(lr_scheduler.ExponentialLR(optimizer, 0.9))
        if not runs:
            optimizer.step_in_backward(block_elements=2 * WIDTH)

        def loss(i: int, optimizer: Any = optimizer, params: Any = params) -> Tensor:
            optimizer.param_groups[0]["betas"] = (0.9 - 0.1 * i, 0.99)
            return product(params)

        train(optimizer, loss)
        runs.append(optimizer)
    assert_exact(*runs)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in runs]
    assert rates[0] == rates[1] == [pytest.approx(0.1 * 0.9**4), pytest.approx(0.2 * 0.9**4)]


def test_a_schedule_that_has_ended_stops_the_backward_pass() -> None:
    (ours, _) = twins()
    optimizer = SGD(ours, lr=0.1)
    optimizer.step_in_backward()
    optimizer.attach(lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2))
    train(optimizer, lambda i: product(ours), 2)
    before = [p.detach().clone() for p in ours]
    with pytest.raises(ValueError, match="total steps"):
        product(ours).backward()
    assert_equal(ours, before, atol=0)


@both
def test_a_closure(compiled: bool) -> None:
    runs = []
    for params in twins():
        optimizer = Adam(params, lr=0.1, compiled=compiled)
        if not runs:
            optimizer.step_in_backward()

        def closure(optimizer: Any = optimizer, params: Any = params) -> Tensor:
            optimizer.zero_grad()
            loss = product(params)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        runs.append((optimizer, losses))
    assert runs[0][1] == runs[1][1]
    assert_exact(runs[0][0], runs[1][0])


@both
def test_a_checkpoint_is_loaded_in_between(compiled: bool) -> None:
    ours, theirs = twins()
    mine, ordinary = (Adam(params, lr=0.1, compiled=compiled) for params in (ours, theirs))
    mine.step_in_backward(block_elements=WIDTH)
    train(mine, lambda i: product(ours), 2)
    train(ordinary, lambda i: product(theirs), 2)
    saved = copy.deepcopy(ordinary.state_dict())
    train(mine, lambda i: product(ours), 1)
    train(ordinary, lambda i: product(theirs), 1)
    for optimizer in (mine, ordinary):
        optimizer.load_state_dict(copy.deepcopy(saved))
    train(mine, lambda i: product(ours), 2)
    train(ordinary, lambda i: product(theirs), 2)
    assert_exact(mine, ordinary)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(backend: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    plain = copy.deepcopy(model)
    mine, ordinary = (Adam(m.parameters(), lr=0.1) for m in (model, plain))
    mine.step_in_backward(model, block_elements=1)
    forward = torch.compile(model, backend=backend)
    x = torch.randn(4, 3, dtype=torch.float64)
    train(mine, lambda i: forward(x).square().sum())
    train(ordinary, lambda i: plain(x).square().sum())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@both
def test_a_compiled_iteration(compiled: bool) -> None:
    """Its backward pass, step and zero_grad are outside of graphs."""
    ours, theirs = twins()
    mine, ordinary = (Adam(params, lr=0.1, compiled=compiled) for params in (ours, theirs))

    @torch.compile(backend="eager")
    def iteration(params: Any, optimizer: Any) -> None:
        product(params).backward()
        optimizer.step()
        optimizer.zero_grad()

    iteration(ours, mine)  # a graph from before is not used any more
    train(ordinary, lambda i: product(theirs), 1)
    mine.step_in_backward(torch.nn.ParameterList(ours[1:]))
    for _ in range(3):
        iteration(ours, mine)
        train(ordinary, lambda i: product(theirs), 1)
    assert_equal(ours, theirs)  # a traced step rounds in other places
    product(ours).backward()
    mine.zero_grad()
    iteration(ours, mine)


@both
@pytest.mark.parametrize("reentrant", [False, True], ids=["recomputed", "reentrant"])
def test_checkpointed_segments(compiled: bool, reentrant: bool) -> None:
    """A reentrant one has a backward pass of its own within the other."""
    ours, theirs = twins(6)
    mine, ordinary = (Adam(params, lr=0.1, compiled=compiled) for params in (ours, theirs))
    mine.step_in_backward(block_elements=2 * WIDTH)

    def loss(params: Any) -> Tensor:
        x = params[0] + 1
        for pair in (params[1:3], params[3:5]):
            x = checkpoint(lambda x, *pair: x * pair[0] * pair[1], x, *pair, use_reentrant=reentrant)
        return (x * params[5]).sum()  # type: ignore[no-any-return]

    train(mine, lambda i: loss(ours))
    train(ordinary, lambda i: loss(theirs))
    assert_exact(mine, ordinary)


@both
def test_a_backward_pass_in_another_thread(compiled: bool) -> None:
    """As that of each GPU is."""
    ours, theirs = twins()
    mine, ordinary = (Adam(params, lr=0.1, compiled=compiled) for params in (ours, theirs))
    mine.step_in_backward()
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(product(ours).backward).result()
        mine.step()
        train(ordinary, lambda i: product(theirs), 1)
    assert_exact(mine, ordinary)


# ---- clipping


@both
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_norm_of_the_iteration_before_clips(compiled: bool, norm_type: float) -> None:
    """In the first iteration that of the gradients so far, in the order in which they arrive."""
    ours, theirs = twins()
    mine = Adam(ours, lr=0.1, compiled=compiled, max_grad_norm=0.5, norm_type=norm_type)
    stock = torch.optim.Adam(theirs, lr=0.1)
    mine.step_in_backward(block_elements=1, norm="previous")
    before = None
    for i in range(4):
        grads = torch.autograd.grad(product(theirs), theirs)
        norm = torch.linalg.vector_norm(torch.cat(grads), norm_type)
        for k, p in enumerate(theirs):
            so_far = torch.linalg.vector_norm(torch.cat(grads[k:]), norm_type)
            p.grad = grads[k] * min(1.0, mine.max_grad_norm / ((so_far if before is None else before) + 1e-6))
        stock.step()
        train(mine, lambda i: product(ours), 1)
        torch.testing.assert_close(mine.grad_norm, norm, rtol=1e-12, atol=0)
        assert_equal(ours, theirs)
        before = norm
        mine.max_grad_norm = 0.4 - 0.1 * i


@both
def test_a_norm_that_is_not_finite_clips_nothing(compiled: bool) -> None:
    ours, theirs = twins()
    options: dict[str, Any] = {"lr": 0.1, "compiled": compiled, "max_grad_norm": 0.5}
    mine, other = SGD(ours, **options), SGD(theirs, **options)
    for optimizer in (mine, other):
        optimizer.step_in_backward(norm="previous")
    train(mine, lambda i: product(ours), 1)
    train(other, lambda i: product(theirs), 1)
    values = [p.detach().clone() for p in ours]
    train(mine, lambda i: product(ours, math.inf), 1)
    assert mine.grad_norm == math.inf
    with torch.no_grad():
        for p, value in zip(ours, values, strict=True):
            p.copy_(value)
    train(mine, lambda i: product(ours), 1)
    train(other, lambda i: product(theirs), 1)
    assert_exact(mine, other)


def test_a_norm_that_is_not_finite_can_be_an_error() -> None:
    (params, _) = twins()
    optimizer = SGD(params, lr=0.1, max_grad_norm=0.5, error_if_nonfinite=True)
    optimizer.step_in_backward(block_elements=1, norm="previous")
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"is not finite"):
        product(params, math.inf).backward()
    assert_equal(params, before, atol=0)


# ---- gradients and kernels


@both
def test_few_gradients_exist_at_a_time(compiled: bool) -> None:
    params = [parameter(torch.full((WIDTH,), 0.1 * i, dtype=torch.float64)) for i in range(20)]
    live = []
    for p in params:  # called before the hook of the optimizer
        p.register_post_accumulate_grad_hook(lambda _: live.append(sum(q.grad is not None for q in params)))
    optimizer = SGD(params, lr=0.1, compiled=compiled)
    optimizer.step_in_backward(block_elements=3 * WIDTH)
    product(params).backward()
    assert live == [1, 2, 3] * 6 + [1, 2]
    assert [p.grad for p in params] == [None] * 20
    optimizer.step()
    live.clear()
    product(params[::-1]).backward()  # the first block has two parameters now
    assert max(live) <= 6
    assert [p.grad for p in params] == [None] * 20


def test_all_blocks_share_a_kernel_and_explain_sums_them() -> None:
    params = [parameter(t) for t in tensors([(WIDTH,)] * 6)]
    optimizer = AdamW(params, lr=0.1, compiled=True)
    optimizer.step_in_backward(block_elements=2 * WIDTH)
    assert [row.reason for row in explain(optimizer)] == ["no step was taken yet"]
    compiled_optim.cache_clear()
    train(optimizer, lambda i: product(params))
    assert compiled_optim.cache_info().kernels == 1
    (row,) = explain(optimizer)
    assert (row.execution, row.tensors, row.elements, row.launches) == ("multi_tensor", 6, 6 * WIDTH, 3)
    assert explain(optimizer).rebuilt == ["the first step"]


@pytest.mark.usefixtures("lenient")
def test_a_fallback_is_told_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("COMPILED_OPTIM_DISK_CACHE", "0")
    compiled_optim.cache_clear()
    params = [parameter(t) for t in tensors([(WIDTH,)] * 4)]
    optimizer = compiled_optim.Rprop(params, compiled=True)
    optimizer.step_in_backward(block_elements=1)
    with pytest.warns(compiled_optim.CompileFallbackWarning) as told:
        train(optimizer, lambda i: product(params))
    assert len(told) == 1
    assert [(row.execution, row.tensors) for row in explain(optimizer)] == [("eager", 4)]


def test_without_the_private_parts_of_torch_each_parameter_is_updated_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "missing", ["a part is gone"])
    ours, theirs = twins()
    mine, ordinary = (Adam(params, lr=0.1) for params in (ours, theirs))
    mine.step_in_backward()
    product(ours).backward()
    assert [p.grad for p in ours] == [None] * 4
    mine.step()
    train(ordinary, lambda i: product(theirs), 1)
    assert_exact(mine, ordinary)


# ---- parameters that come and go


@both
def test_parameters_outside_of_the_model_are_left_to_step(compiled: bool) -> None:
    ours, theirs = twins()
    mine, ordinary = (Adam(params, lr=0.1, compiled=compiled) for params in (ours, theirs))
    mine.step_in_backward(torch.nn.ParameterList(ours[:2]))
    for _ in range(3):
        product(ours).backward()
        assert [p.grad is None for p in ours] == [True, True, False, False]
        mine.step()
        assert [p.grad is None for p in ours] == [True, True, False, False]
        mine.zero_grad()
        train(ordinary, lambda i: product(theirs), 1)
    assert_exact(mine, ordinary)


@both
def test_parameters_are_added_frozen_unfrozen_and_replaced(compiled: bool) -> None:
    ours, theirs = twins(6)
    ours[1].requires_grad = theirs[1].requires_grad = False
    mine, ordinary = (Adam(params[:4], lr=0.1, compiled=compiled) for params in (ours, theirs))
    mine.step_in_backward(block_elements=WIDTH)

    def both_train() -> None:
        train(mine, lambda i: product(ours), 2)
        assert all(p.grad is None for group in mine.param_groups for p in group["params"])
        train(ordinary, lambda i: product(theirs), 2)
        assert_exact(mine, ordinary)

    both_train()
    for optimizer, params in ((mine, ours), (ordinary, theirs)):
        params[0].requires_grad, params[1].requires_grad = False, True
        optimizer.add_param_group({"params": params[4:5], "lr": 0.2})
    both_train()
    for optimizer, params in ((mine, ours), (ordinary, theirs)):
        optimizer.param_groups[0]["params"][2] = params[5]
        params[0].requires_grad = True
    both_train()
    product(ours).backward()
    assert ours[2].grad is not None  # it is in no param group any more
    assert [p.grad for p in ours[3:]] == [None] * 3


def test_remove_ends_it() -> None:
    ours, theirs = twins()
    mine, ordinary = (Adam(params, lr=0.1) for params in (ours, theirs))
    with mine.step_in_backward():
        train(mine, lambda i: product(ours), 2)
    product(ours).backward()
    assert all(p.grad is not None for p in ours)
    mine.zero_grad()
    train(mine, lambda i: product(ours), 1)
    train(ordinary, lambda i: product(theirs), 3)
    assert_exact(mine, ordinary)
    handle = mine.step_in_backward()
    product(ours).backward()
    assert all(p.grad is None for p in ours)
    handle.remove()
    handle.remove()


def test_hooks_do_not_keep_the_optimizer_alive() -> None:
    (params, _) = twins()
    optimizer = Adam(params, lr=0.1)
    handle = optimizer.step_in_backward()
    train(optimizer, lambda i: product(params), 1)
    reference, state = weakref.ref(optimizer), weakref.ref(optimizer.state[params[0]]["exp_avg"])
    del optimizer
    gc.collect()
    assert reference() is None
    assert state() is None
    before = [p.detach().clone() for p in params]
    product(params).backward()
    assert all(p.grad is not None for p in params)
    assert_equal(params, before, atol=0)
    handle.remove()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_steps_in_the_ordinary_way(copied: Any) -> None:
    (params, _) = twins()
    optimizer = Adam(params, lr=0.1)
    optimizer.step_in_backward()
    train(optimizer, lambda i: product(params), 1)
    other = copied(optimizer)
    mine = other.param_groups[0]["params"]
    product(mine).backward()
    assert all(p.grad is not None for p in mine)
    other.step()
    train(optimizer, lambda i: product(params), 1)
    assert_exact(other, optimizer)


# ---- what goes wrong


class Failing(torch.autograd.Function):
    """Raises in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")


@both
@pytest.mark.parametrize("then", ["step", "zero_grad"])
def test_a_backward_pass_that_raises_has_updated_what_came_before(compiled: bool, then: str) -> None:
    params, copies = twins()
    optimizer, ordinary = (Adam(some, lr=0.1, compiled=compiled) for some in (params, copies))
    optimizer.step_in_backward(block_elements=2 * WIDTH)
    with pytest.raises(ArithmeticError, match="on purpose"):
        product(params[1:], Failing.apply(params[0])).backward()  # a block, and one that waits
    before = [p.detach().clone() for p in copies]
    product(copies[1:], copies[0].detach()).backward()
    assert_equal(params[:2], before[:2], atol=0)
    assert [p.grad is None for p in params] == [True, False, True, True]
    if then == "zero_grad":
        copies[1].grad = None
        optimizer.zero_grad()
    else:
        optimizer.step()
        optimizer.zero_grad()
    ordinary.step()
    ordinary.zero_grad()
    assert_exact(optimizer, ordinary)
    train(optimizer, lambda i: product(params))
    train(ordinary, lambda i: product(copies))
    assert_exact(optimizer, ordinary)


@both
@pytest.mark.parametrize("block_elements", [1, 1000])
def test_an_update_that_raises_ends_the_backward_pass(compiled: bool, block_elements: int) -> None:
    """Be it in the midst of the pass or at its end."""
    (params, _) = twins()
    optimizer = Adam(params, lr=0.1, compiled=compiled)
    optimizer.step_in_backward(block_elements=block_elements)
    train(optimizer, lambda i: product(params), 1)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises((TypeError, ValueError), match="fast"):
        product(params).backward()
    assert_equal(params, before, atol=0)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()  # of the gradients that there were
    updated = [not torch.equal(p, q) for p, q in zip(params, before, strict=True)]
    assert updated == [block_elements > 1] * 3 + [True]


def test_errors_name_the_parameter_where_the_optimizer_has_it() -> None:
    (params, _) = twins()
    optimizer = Adam(params, lr=0.1)
    optimizer.step_in_backward(block_elements=1)
    train(optimizer, lambda i: product(params), 1)
    optimizer.state[params[2]]["exp_avg"] = torch.zeros(WIDTH + 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="at index 2 of param group 0"):
        product(params).backward()


def test_more_accumulations_than_micro_steps() -> None:
    (params, _) = twins()
    optimizer = SGD(params, lr=0.1)
    optimizer.step_in_backward(micro_steps=2)
    product(params).backward()
    product(params).backward()
    with pytest.raises(RuntimeError, match=r"micro_steps must be .*got 2.*shape \(4,\) was accumulated 3 times"):
        product(params).backward()
    optimizer.zero_grad()
    product(params).backward()
    assert all(p.grad is not None for p in params)


def test_a_graph_that_is_used_again() -> None:
    (params, _) = twins()
    optimizer = SGD(params, lr=0.1)
    handle = optimizer.step_in_backward()
    loss = torch.cat([p**2 for p in params]).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    handle.remove()
    optimizer.zero_grad()
    optimizer.step_in_backward(micro_steps=2)
    loss = torch.cat([p**2 for p in params]).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert [p.grad for p in params] == [None] * 4


def test_gradients_of_gradients_are_no_updates() -> None:
    (params, _) = twins()
    optimizer = SGD(params, lr=0.1)
    optimizer.step_in_backward()
    before = [p.detach().clone() for p in params]
    grads = torch.autograd.grad(product(params), params, create_graph=True)
    assert_equal(params, before, atol=0)
    torch.stack([g.square().sum() for g in grads]).sum().backward()
    assert [p.grad for p in params] == [None] * 4


def test_a_grad_scaler_is_refused() -> None:
    (params, _) = twins()
    optimizer = Adam(params, lr=0.1, fused=True)
    optimizer.step_in_backward()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(product(params)).backward()
    with pytest.raises(RuntimeError, match="step_in_backward does not support a GradScaler"):
        scaler.step(optimizer)


def test_arguments_are_checked() -> None:
    (params, _) = twins()
    optimizer = SGD(params, lr=0.1)
    for given in ({"max_grad_norm": 1.5}, {"skip_nonfinite": True}):
        ((name, value),) = given.items()
        with pytest.raises(ValueError, match=f"does not support {name}={value}"):
            SGD(params, lr=0.1, **given).step_in_backward()
    with pytest.raises(ValueError, match=r"norm='previous' needs .* max_grad_norm=None"):
        optimizer.step_in_backward(norm="previous")
    with pytest.raises(ValueError, match="norm must be 'previous' or None, got 2"):
        optimizer.step_in_backward(norm=2)  # type: ignore[arg-type]
    for name in ("micro_steps", "block_elements"):
        for value in (0, 1.5):
            with pytest.raises(ValueError, match=f"{name} must be an int of at least 1, got {value}"):
                optimizer.step_in_backward(**{name: value})
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module or None, got a list"):
        optimizer.step_in_backward(params)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must have parameters of the optimizer"):
        optimizer.step_in_backward(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="does not support differentiable=True"):
        SGD(params, lr=0.1, differentiable=True).step_in_backward()
    optimizer.step_in_backward()
    with pytest.raises(ValueError, match="was called before"):
        optimizer.step_in_backward()


def test_param_groups_change_while_a_gradient_waits() -> None:
    (params, _) = twins(3)
    optimizer = SGD(params[:2], lr=0.1)
    optimizer.step_in_backward()
    with pytest.raises(ArithmeticError):
        product(params[1:2], Failing.apply(params[0])).backward()
    optimizer.add_param_group({"params": params[2:]})
    before = params[1].detach() - 0.1 * params[1].grad
    optimizer.step()
    assert_equal([params[1]], [before])


# ---- at random


@both
@pytest.mark.parametrize("seed", range(12))
def test_random_iterations(seed: int, compiled: bool) -> None:
    """Parameters come in any order or not at all, and everything else changes between iterations."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    values = tensors([(draw.choice([1, 3, 20]),) for _ in range(9)])
    lists = [[parameter(v) for v in values] for _ in range(2)]
    runs: list[Any] = [
        Adam([{"params": params[:3]}, {"params": params[3:6], "lr": 0.02}], lr=0.05, compiled=compiled)
        for params in lists
    ]
    handle, micro_steps, used = None, 1, 6
    for i in range(12):
        if i % 4 == 0:
            if handle is not None:
                handle.remove()
            micro_steps = draw.choice([1, 2, 3])
            handle = runs[0].step_in_backward(micro_steps=micro_steps, block_elements=draw.choice([1, 5, 20, 1000]))
        change = draw.randrange(8)
        if change == 0 and used < len(values):
            for params, optimizer in zip(lists, runs, strict=True):
                optimizer.add_param_group({"params": params[used : used + 1]})
            used += 1
        k = draw.randrange(used)
        saved = runs[1].state_dict()
        for params, optimizer in zip(lists, runs, strict=True):
            if change == 1:
                params[k].requires_grad = not params[k].requires_grad
            elif change == 2:
                optimizer.param_groups[0]["lr"] *= 0.9
            elif change == 3:
                optimizer.load_state_dict(copy.deepcopy(saved))
        for _ in range(draw.randint(1, micro_steps)):
            order = [k for k in range(used) if draw.random() < 0.8 and lists[0][k].requires_grad]
            draw.shuffle(order)
            for params in lists:
                if order:
                    product([params[k].tanh().mean() for k in order], torch.ones(1, dtype=torch.float64)).backward()
        for optimizer in runs:
            optimizer.step()
            optimizer.zero_grad()
        assert_exact(*runs)
