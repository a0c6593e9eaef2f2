"""The eager execution: the rule on buckets of tensors, on one tensor with its graph, or on rows of a sparse gradient.

It is the default, and what every other execution falls back to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_optim._engine.executions.state import Journal, withdraw
from compiled_optim._engine.executions.survey import (
    Member,
    Scalars,
    Values,
    advance,
    commit,
    in_order,
    look,
)
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.rule import Rule, apply, arithmetic_dtype, evaluate
from compiled_optim._engine.torch_private import tensor_parts
from compiled_optim._engine.values import TensorList

# Bounds the temporaries of a step, and keeps them in cache.
BUCKET_ELEMENTS = 1 << 17
# A tensor of this size is updated by itself: copying it to a bucket costs more than the calls that are saved.
ALONE_ELEMENTS = 1 << 14


class Batch(NamedTuple):
    """Members that are done at once: with these scalars, or None if what they depend on is written before; and what is
    carried on, as `advance` takes it."""

    members: list[Member]
    scalars: dict[str, Any] | None
    carried: Sequence[Any]


def step(work: Work) -> None:
    """One eager step."""
    prepare(work)()


def prepare(work: Work, only: Iterable[tuple[int, Tensor]] | None = None) -> Callable[[], None]:
    """One eager step of all parameters, or of those in ``only`` (group, parameter): the function that takes it.

    What there is to raise is raised here, where nothing is changed.
    """
    differentiable = bool(work.defaults.get("differentiable"))
    groups = work.groups
    capturable = [bool(group.get("capturable")) for group in groups]
    choices = work.read(keep_tensors=differentiable or any(capturable))
    rule = work.rule
    updates = look(work, choices, only)
    switches = [choice.switches for choice in choices]

    def scalars(group: int, counts: Sequence[Any]) -> Values:
        return evaluate(rule, choices[group].hyper, counts)

    with torch.no_grad():
        one_by_one = [group.get("foreach") is False for group in groups]
        found = [] if differentiable else batches(updates, scalars, one_by_one, capturable)

    def take() -> None:
        journal: Journal = []
        try:
            commit(work, choices, updates, journal)
            with torch.set_grad_enabled(differentiable):
                if differentiable:
                    run_differentiable(rule, updates, switches, scalars)
                else:
                    run(rule, found, switches, scalars)
        except BaseException:
            withdraw(work, journal)
            raise

    return take


def batches(updates: list[Member], scalars: Scalars, one_by_one: list[bool], capturable: list[bool]) -> list[Batch]:
    """The parts of a step, in their order.

    Args:
        one_by_one (``foreach=False``), capturable: by param group; where capturable, step counts are read on their
            device only, never by the host.
    """
    found = []
    for members, values, turn in in_order(updates, scalars, capturable):
        single = one_by_one[members[0].group] or members[0].grad.is_sparse
        for bucket in buckets(members, 1 if single else BUCKET_ELEMENTS):
            known = values or (on_device(bucket, scalars) if turn == 0 else (None, ()))
            found.append(Batch(bucket, *known))
    return found


def run(rule: Rule, found: list[Batch], switches: list[Any], scalars: Scalars) -> None:
    """Members parameters and state in place."""
    for members, values, carried in found:
        known, after = (values, carried) if values is not None else on_device(members, scalars)
        run_bucket(rule, members, switches[members[0].group], known)
        advance(members, after)


def on_device(members: list[Member], scalars: Scalars) -> Values:
    """The scalars of counts that only their device may read: what depends on them is a list of 0-d tensors."""
    step, *carried = (torch.stack([u.state[name] for u in members]) for name in members[0].counts)
    values, after = scalars(members[0].group, (step + 1, *carried))
    return {k: TensorList(v.unbind()) if isinstance(v, Tensor) and v.dim() else v for k, v in values.items()}, after


def buckets(members: list[Member], limit: int) -> Iterator[list[Member]]:
    bucket: list[Member] = []
    total = 0
    for u in members:
        if u.param.numel() >= ALONE_ELEMENTS:
            yield [u]
            continue
        if bucket and total + u.param.numel() > limit:
            yield bucket
            bucket, total = [], 0
        bucket.append(u)
        total += u.param.numel()
    if bucket:
        yield bucket


def run_bucket(rule: Rule, members: list[Member], on: Any, values: dict[str, Any]) -> None:
    """Members one bucket: on CPU as one flat tensor, for a list op there is a loop over tensors; elsewhere as lists."""
    first = members[0]
    if first.grad.is_sparse:
        for u in members:
            run_rows(rule, u, on, values)
        return
    columns = [[u.param for u in members], [u.grad for u in members]]
    columns += [[u.state[name] for u in members] for name in first.buffers]
    if first.param.is_complex():
        columns[1] = [g.resolve_conj() for g in columns[1]]  # a lazily conjugated one has no real view
        columns = [[torch.view_as_real(t) for t in column] for column in columns]
    if not rule.elementwise:
        for tensors in zip(*columns, strict=True):
            run_value(rule, on, list(tensors), first.buffers, values)
    elif first.param.device.type != "cpu" or any(isinstance(v, TensorList) for v in values.values()):
        run_value(rule, on, [TensorList(column) for column in columns], first.buffers, values)
    elif len(members) == 1:
        for piece in pieces([column[0] for column in columns]):
            run_value(rule, on, [TensorList([t]) for t in piece], first.buffers, values)
    else:
        flat = [tensor_parts.flatten(column) for column in columns]
        run_value(rule, on, [TensorList([t]) for t in flat], first.buffers, values)
        for column, source in zip([columns[0], *columns[2:]], [flat[0], *flat[2:]], strict=True):
            torch._foreach_copy_(column, tensor_parts.unflatten(source, column))


def run_value(rule: Rule, on: Any, value: list[Any], buffers: tuple[str, ...], scalars: Any) -> None:
    """Members (parameter, gradient, buffers...) in place."""
    state = {name: value[2 + i] for i, name in enumerate(buffers)}
    new, new_state = apply(rule, on, value[0], value[1], state, scalars)
    value[0].copy_(new)
    for name, tensor in state.items():
        tensor.copy_(new_state[name])


def update_lists(
    rule: Rule,
    on: Any,
    params: list[Tensor],
    grads: list[Tensor],
    state: dict[str, list[Tensor]],
    scalars: dict[str, list[Any]],
) -> None:
    """Members tensors of one kind in place, with scalars for each of them. Dynamo can trace it."""
    buffers = tuple(state)
    columns = [params, grads, *state.values()]
    if params[0].is_complex():
        columns = [[torch.view_as_real(t.resolve_conj()) for t in column] for column in columns]
    if rule.elementwise:
        # the scalars as lists, too: Dynamo takes a list value times a tensor for an operation of the tensor
        values = {name: TensorList(each) for name, each in scalars.items()}
        run_value(rule, on, [TensorList(column) for column in columns], buffers, values)
        return
    for i in range(len(params)):
        run_value(rule, on, [t[i] for t in columns], buffers, {name: each[i] for name, each in scalars.items()})


def pieces(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    """A large update cut into parts whose temporaries stay in cache, where its tensors are contiguous."""
    if tensors[0].numel() <= BUCKET_ELEMENTS or not all(t.is_contiguous() for t in tensors):
        return [tensors]
    return map(list, zip(*(torch.split(t.view(-1), BUCKET_ELEMENTS) for t in tensors), strict=True))


def run_rows(rule: Rule, u: Member, on: Any, values: dict[str, Any]) -> None:
    """A sparse gradient. Where the rule leaves a row without gradient as it is, only the touched rows are visited."""
    grad = u.grad.coalesce()
    if not rule.keeps_untouched_rows(on):
        run_bucket(rule, [replace(u, grad=grad.to_dense())], on, values)
        return
    # behind a dimension of one, for a gradient may have no sparse dimension
    tensors = [t[None] for t in (u.param, *(u.state[name] for name in u.buffers))]
    indices = grad.indices()
    rows = (indices.new_zeros(indices.shape[1]), *indices)
    touched = [t[rows] for t in tensors]
    column = dict(zip(u.buffers, touched[1:], strict=True))
    made = replace(u, param=touched[0], grad=grad.values(), state=column)
    run_bucket(rule, [made], on, values)
    for tensor, new in zip(tensors, touched, strict=True):
        tensor[rows] = new


def run_differentiable(rule: Rule, updates: list[Member], switches: list[Any], scalars: Scalars) -> None:
    """The rule with autograd recording: parameters are written in place, state tensors are replaced.

    Of each turn all is computed before any is written.
    """
    for turn in sorted({u.turn for u in updates}):
        members = [u for u in updates if u.turn == turn]
        results = [_differentiated(rule, u, switches, scalars) for u in members]
        for u, (new, state) in zip(members, results, strict=True):
            u.param.copy_(new)
            advance([u], ())
            u.state.update(state)


def _differentiated(rule: Rule, u: Member, switches: list[Any], scalars: Scalars) -> tuple[Tensor, dict[str, Tensor]]:
    """The new parameter and the new state, but for the step count."""
    # as tensors, so that what is carried keeps its graph
    counts = [u.state[name].double() + (name == "step") for name in u.counts]
    values, after = scalars(u.group, counts or u.next_counts())
    carried = {name: value.to(u.state[name].dtype) for name, value in zip(u.counts[1:], after, strict=True)}
    complex_valued = u.param.is_complex()

    def view(t: Tensor) -> Tensor:
        return torch.view_as_real(t) if complex_valued else t

    width = arithmetic_dtype(u.param.dtype).to_real()
    values = {k: v if isinstance(v, Tensor) else torch.tensor(v, dtype=width, device="cpu") for k, v in values.items()}
    state = {name: view(u.state[name]) for name in u.buffers}
    # a copy, for what the graph saves must not be what is written later
    new, new_state = apply(rule, switches[u.group], view(u.param.clone()), view(u.grad), state, values)
    if complex_valued:
        new, new_state = torch.view_as_complex(new), {k: torch.view_as_complex(v) for k, v in new_state.items()}
    return new, {**carried, **new_state}
