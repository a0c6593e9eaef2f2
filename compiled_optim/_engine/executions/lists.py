"""The eager execution: the rule on lists of tensors, on one tensor with its graph, or on rows of a sparse gradient.

It is the default, and what every other execution falls back to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_optim._engine.executions.checks import are_fake
from compiled_optim._engine.executions.program import Program, record
from compiled_optim._engine.executions.state import Journal, withdraw
from compiled_optim._engine.executions.steady import again, remember
from compiled_optim._engine.executions.survey import (
    Member,
    Scalars,
    Values,
    advance,
    advance_counts,
    commit,
    in_order,
    look,
    touch_listed,
)
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.one_pass import arithmetic_dtype
from compiled_optim._engine.rule import Rule, apply, check_numbers
from compiled_optim._engine.values import TensorList

# Of the lists that are updated at once: it bounds the temporaries of a step on CPU, and keeps them in cache.
CHUNK_ELEMENTS = 1 << 19


class Batch(NamedTuple):
    """Members that are done at once: with these scalars, or None if what they depend on is written before; and what is
    carried on, as `advance` takes it. ``single``: one tensor at a time."""

    members: list[Member]
    scalars: dict[str, Any] | None
    carried: Sequence[Any]
    single: bool


def step(work: Work) -> None:
    """One eager step."""
    if work.defaults.get("differentiable") or any(group.get("capturable") for group in work.groups):
        prepare(work)()
        return
    choices, rule = work.read(), work.rule
    switches = [choice.switches for choice in choices]
    found = again(work, switches)
    if found is None:
        prepare(work)()
        return

    def scalars(group: int, counts: Sequence[Any]) -> Values:
        return work.evaluate(choices[group].hyper, counts)

    with torch.no_grad():
        single = [group.get("foreach") is False for group in work.groups]
        updates = [
            Lists(group, columns, counts, *scalars(group, at), single[group]) for group, columns, counts, at in found
        ]
        run_lists(rule, updates, switches, scalars)


def prepare(work: Work, only: Iterable[tuple[int, Tensor]] | None = None) -> Callable[[], None]:
    """One eager step of all parameters, or of those in ``only`` (group, parameter): the function that takes it.

    What there is to raise is raised here, where nothing is changed.
    """
    differentiable = bool(work.defaults.get("differentiable"))
    groups = work.groups
    rule, fake = work.rule, any([are_fake(group["params"]) for group in groups])  # noqa: C419
    capturable = [bool(group.get("capturable") or (fake and rule.declaration.counts)) for group in groups]
    choices = work.read(keep_tensors=differentiable or fake or any(capturable))
    updates = look(work, choices, only)
    switches = [choice.switches for choice in choices]

    def scalars(group: int, counts: Sequence[Any]) -> Values:
        return work.evaluate(choices[group].hyper, counts)

    if only is None and not differentiable and not any(capturable):
        remember(work, switches, updates)
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
        known, after = values or (on_device(members[0].group, counts_of(members), scalars) if turn == 0 else (None, ()))
        found.append(Batch(members, known, after, one_by_one[members[0].group]))
    return found


class Lists(NamedTuple):
    """The tensors of a batch: ``columns`` are parameters, gradients and each buffer."""

    group: int
    columns: list[list[Tensor]]
    counts: list[list[Tensor]]
    scalars: dict[str, Any] | None
    carried: Sequence[Any]
    single: bool


class Update(NamedTuple):
    """What is done to the tensors of a batch; ``program``: the rule recorded, or None if it is run on the tensors."""

    rule: Rule
    on: Any
    buffers: tuple[str, ...]
    scalars: dict[str, Any]
    program: Program | None
    single: bool


def run(rule: Rule, found: list[Batch], switches: list[Any], scalars: Scalars) -> None:
    """Updates parameters and state in place."""
    lists = []
    for members, values, carried, single in found:
        first = members[0]
        columns = [[u.param for u in members], [u.grad for u in members]]
        columns += [[u.state[name] for u in members] for name in first.buffers]
        lists.append(Lists(first.group, columns, counts_of(members), values, carried, single))
    run_lists(rule, lists, switches, scalars)
    for members, *_ in found:
        touch_listed(members)


def run_lists(rule: Rule, found: list[Lists], switches: list[Any], scalars: Scalars) -> None:
    """The rule is recorded for all lists before anything is written."""
    programs = [_record(rule, switches[lists.group], lists) for lists in found]
    for (group, columns, counts, values, carried, single), program in zip(found, programs, strict=True):
        known, after = (values, carried) if values is not None else on_device(group, counts, scalars)
        factor, device = known.get("grad_factor"), columns[0][0].device
        if isinstance(factor, Tensor) and factor.device != device:
            known = {**known, "grad_factor": factor.to(device, non_blocking=True)}
        on = switches[group]
        update = Update(
            rule, on, rule.declaration.kept(on, columns[0][0].dtype, columns[0][0].dim()), known, program, single
        )
        if columns[1][0].is_sparse:
            for tensors in zip(*columns, strict=True):
                run_rows(update, list(tensors))
        else:
            run_bucket(update, columns)
        advance_counts(counts, after)


def counts_of(members: list[Member]) -> list[list[Tensor]]:
    return [[u.state[name] for u in members] for name in members[0].counts]


def on_device(group: int, counts: list[list[Tensor]], scalars: Scalars) -> Values:
    """The scalars of counts that only their device may read: what depends on them is a list of 0-d tensors."""
    step, *carried = map(torch.stack, counts)
    values, after = scalars(group, (step + 1, *carried))
    return {k: TensorList(v.unbind()) if isinstance(v, Tensor) and v.dim() else v for k, v in values.items()}, after


def _record(rule: Rule, on: Any, lists: Lists) -> Program | None:
    """None for a rule on whole tensors, and where a rule or its scalars hold tensors."""
    values = lists.scalars
    if not rule.elementwise or values is None or any(isinstance(v, TensorList) for v in values.values()):
        return None
    first = [column[0] for column in lists.columns]
    return record(rule, on, [t.dtype.to_real() for t in first], first[0].device, values)


def run_bucket(update: Update, columns: list[list[Tensor]]) -> None:
    """Updates parameters in place, and their state; ``columns``: parameters, gradients, and each buffer."""
    rule, on, buffers, scalars, program, single = update
    if columns[0][0].is_complex():
        columns[1] = [g.resolve_conj() for g in columns[1]]  # a lazily conjugated one has no real view
        columns = [[torch.view_as_real(t) for t in column] for column in columns]
    if not rule.elementwise:
        for tensors in zip(*columns, strict=True):
            if tensors[0].numel():  # the mean of nothing is NaN
                run_value(rule, on, list(tensors), buffers, scalars)
        return
    by_tensor = any(isinstance(v, TensorList) for v in scalars.values())
    cuts = (program is None or program.makes_temporaries) and not rule.rounds(columns[0][0].dtype)
    for part in [columns] if by_tensor else _parts(columns, single, cuts):
        if program is not None:
            program.run(part)
        else:
            run_value(rule, on, [TensorList(column) for column in part], buffers, scalars)


def _parts(columns: list[list[Tensor]], single: bool, cuts: bool) -> Iterator[list[list[Tensor]]]:
    """Columns of about CHUNK_ELEMENTS. ``cuts``: whether larger tensors are cut, if they are contiguous."""
    sizes = [*map(Tensor.numel, columns[0])]
    if not single and (columns[0][0].device.type != "cpu" or sum(sizes) <= CHUNK_ELEMENTS):
        yield columns
        return
    begin = total = 0
    for i, size in enumerate(sizes):
        if begin < i and (single or total + size > CHUNK_ELEMENTS):
            yield [column[begin:i] for column in columns]
            begin, total = i, 0
        if cuts and size > CHUNK_ELEMENTS and all(column[i].is_contiguous() for column in columns):
            for piece in zip(*(torch.split(column[i].view(-1), CHUNK_ELEMENTS) for column in columns), strict=True):
                yield [[t] for t in piece]
            begin = i + 1
        else:
            total += size
    if begin < len(sizes):
        yield [column[begin:] for column in columns]


def run_value(rule: Rule, on: Any, value: list[Any], buffers: tuple[str, ...], scalars: Any) -> None:
    """Updates (parameter, gradient, buffers...) in place."""
    state = {name: value[2 + i] for i, name in enumerate(buffers)}
    new, new_state = apply(rule, on, value[0], value[1], state, scalars)
    value[0].copy_(new)
    for name, tensor in state.items():
        tensor.copy_(new_state[name])


def run_rows(update: Update, tensors: list[Tensor]) -> None:
    """A sparse gradient. Where the rule leaves a row without gradient as it is, only the touched rows are visited."""
    grad = tensors.pop(1).coalesce()
    if not update.rule.keeps_untouched_rows(update.on):
        run_bucket(update, [[tensors[0]], [grad.to_dense()], *([t] for t in tensors[1:])])
        return
    # behind a dimension of one, for a gradient may have no sparse dimension
    tensors = [t[None] for t in tensors]
    indices = grad.indices()
    rows = (indices.new_zeros(indices.shape[1]), *indices)
    touched = [t[rows] for t in tensors]
    run_bucket(update, [[touched[0]], [grad.values()], *([t] for t in touched[1:])])
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
    check_numbers(rule, values)
    values = {k: v if isinstance(v, Tensor) else torch.tensor(v, dtype=width, device="cpu") for k, v in values.items()}
    state = {name: view(u.state[name]) for name in u.buffers}
    # a copy, for what the graph saves must not be what is written later
    new, new_state = apply(rule, switches[u.group], view(u.param.clone()), view(u.grad), state, values)
    if complex_valued:
        new, new_state = torch.view_as_complex(new), {k: torch.view_as_complex(v) for k, v in new_state.items()}
    return new, {**carried, **new_state}
