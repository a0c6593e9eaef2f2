"""A step that finds what the step before found: the same kinds of tensors, which `survey.look` has checked.

Looking costs more than updating where tensors are small. What look would check follows from a few attributes of each
tensor, and these are read again in each step, column by column. No tensor is kept from step to step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, compress
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_optim._engine.executions.checks import PLAIN
from compiled_optim._engine.executions.survey import Member
from compiled_optim._engine.executions.work import Work

_PLAIN = {*PLAIN}
_gradient, _layout = attrgetter("grad"), attrgetter("layout")
_facts = attrgetter("shape", "dtype", "device")
Columns = list[list[Tensor]]


class Steady(NamedTuple):
    """What a step found.

    Attributes:
        switches, sizes: of each param group.
        buffers, counts: the names of the state.
        active: of each parameter, whether it had a gradient.
        facts: of the parameters that had, their gradients, buffers and counts.
        kinds: by param group and kind, the places of its members among them.
    """

    switches: list[Any]
    sizes: list[int]
    buffers: tuple[str, ...]
    counts: tuple[str, ...]
    active: list[bool]
    facts: list[list[Any]]
    kinds: list[tuple[int, list[int]]]


class Found(NamedTuple):
    """Tensors of one param group, kind and step count; ``at``: the count after this step, and what is carried."""

    group: int
    columns: Columns  # parameters, gradients, and each buffer
    counts: Columns
    at: tuple[float, ...]


def remember(work: Work, switches: list[Any], members: Sequence[Member]) -> None:
    """Keeps what `look` found for `again`, if it is of the kind that most steps are."""
    work.steady = None
    if not members or any([m.turn or m.lacks or m.buffers != members[0].buffers for m in members]):  # noqa: C419
        return
    params = [*chain.from_iterable(group["params"] for group in work.groups)]
    grads = [*map(_gradient, params)]
    active = [grad is not None for grad in grads]
    buffers, counts = members[0].buffers, members[0].counts
    columns = _columns(work, params, grads, active, (*buffers, *counts))
    listed = [(i, id(p)) for i, group in enumerate(work.groups) for p in group["params"] if p.grad is not None]
    # Python that ran while gradients were looked at may have changed the param groups
    if columns is None or listed != [(m.group, id(m.listed)) for m in members]:
        return
    if any(p.is_complex() or g.layout is not torch.strided for p, g in zip(*columns[:2], strict=True)):
        return
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, m in enumerate(members):
        kinds[m.kind].append(i)
    sizes, facts = [len(group["params"]) for group in work.groups], [[*map(_facts, column)] for column in columns]
    work.steady = Steady(switches, sizes, buffers, counts, active, facts, [(kind[0], at) for kind, at in kinds.items()])


def again(work: Work, switches: list[Any]) -> list[Found] | None:
    """What there is to update, or None if that is not of the kind of the last step's and must be looked at."""
    last = work.steady
    if last is None or work.substitutes is not None or switches != last.switches:
        return None
    if [len(group["params"]) for group in work.groups] != last.sizes:
        return None
    params = [*chain.from_iterable(group["params"] for group in work.groups)]
    grads = [*map(_gradient, params)]
    if [grad is not None for grad in grads] != last.active:
        return None
    columns = _columns(work, params, grads, last.active, (*last.buffers, *last.counts))
    if columns is None or [[*map(_facts, column)] for column in columns] != last.facts:
        return None
    try:
        turns = work.memory.turns([*zip(columns[0], *columns[2:], strict=True)], columns[1])
        numbers = [*zip(*(map(Tensor.item, column) for column in columns[2 + len(last.buffers) :]), strict=True)]
    except RuntimeError:  # which looking explains
        return None
    return None if any(turns) else _split(last, columns, numbers)


def _columns(
    work: Work, params: list[Tensor], grads: list[Tensor], active: list[bool], names: tuple[str, ...]
) -> Columns | None:
    """Parameters, gradients and state, or None if not all are plain and strided, all but the gradients contiguous."""
    columns = [[*compress(params, active)], [*compress(grads, active)]]
    try:
        if names:
            states = [*map(work.state.get, columns[0])]
            columns += [[*map(itemgetter(name), states)] for name in names]
        plain = all({*map(type, column)} <= _PLAIN for column in columns)
        strided = plain and {*map(_layout, columns[1])} == {torch.strided}
        held = strided and all(all(map(Tensor.is_contiguous, column)) for column in (columns[0], *columns[2:]))
    except (KeyError, TypeError, RuntimeError):
        return None
    return columns if held else None


def _split(last: Steady, columns: Columns, numbers: list[tuple[float, ...]]) -> list[Found]:
    found = []
    for group, places in last.kinds:
        parts: dict[Any, list[int]] = {}
        if not numbers:
            parts[(2.0,)] = places
        elif len(places) == len(numbers) == numbers.count(numbers[0]):
            parts[_next(numbers[0])] = places
        else:
            for i in places:
                parts.setdefault(_next(numbers[i]), []).append(i)
        for at, members in parts.items():
            whole = len(members) == len(columns[0])
            own = columns if whole else [[column[i] for i in members] for column in columns]
            end = 2 + len(last.buffers)
            found.append(Found(group, own[:end], own[end:], at))
    return found


def _next(counts: tuple[float, ...]) -> tuple[float, ...]:
    return (counts[0] + 1, *counts[1:])
