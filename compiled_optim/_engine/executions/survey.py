"""The parameters that have a gradient in this step, with their state, for the executions that work on tensors.

A step looks first: `look` and `lists` change nothing, and raise whatever there is to raise. Then `publish` gives the
optimizer the state that was made, and tensors are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from compiled_optim._engine.executions import dtensors
from compiled_optim._engine.executions.checks import (
    COUNT_DTYPES,
    PLAIN,
    check_buffer,
    check_gradient,
    check_kind,
    check_param,
    check_whole,
    described,
    is_count,
    place,
    refuse,
)
from compiled_optim._engine.executions.memory import ShortStorageError
from compiled_optim._engine.executions.state import Journal, make_state, publish
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.torch_private import tensor_parts
from compiled_optim.declare import Choice

_gradient = attrgetter("grad")
_is_none = partial(is_, None)

# of a param group and counts, as `rule.evaluate` returns them
Values = tuple[dict[str, Any], tuple[Any, ...]]
Scalars = Callable[[int, Sequence[Any]], Values]


@dataclass(slots=True, repr=False, eq=False)
class Update:
    """One parameter that has a gradient.

    ``state``: of the parameter, of which the rule sees ``buffers``, or nothing at all for an algorithm without;
    ``counts``: the names of its 0-d state, the step count first, if it keeps one; ``fresh``: whether buffers were made
    in this step; ``made``: all state that was, or None if nothing lacked; ``kind``: what tensors must share to be in
    one list; ``listed``: the parameter in its param group, where that is a DTensor, of which the tensors here are
    shards; ``turn``: how many others must be done before, one after the other, for they share memory.
    """

    group: int
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    buffers: tuple[str, ...]
    counts: tuple[str, ...]
    fresh: bool
    made: dict[str, Any] | None = None
    kind: tuple[Any, ...] = ()
    listed: Tensor | None = None
    turn: int = 0

    def next_counts(self, ahead: Mapping[int, float] = MappingProxyType({})) -> tuple[float, ...]:
        """The step count after this step, and what `scalars` carried here; without a step count, 1 for new state and
        2 after. ``ahead``: by address, what will be there then."""
        if not self.counts:
            return (1.0,) if self.fresh else (2.0,)
        counts = [self.state[name] for name in self.counts]
        try:
            if ahead:
                step, *carried = [ahead[at] if (at := t.data_ptr()) in ahead else t.item() for t in counts]
            else:
                step, *carried = [t.item() for t in counts]
        except RuntimeError as error:
            got = ", ".join(f"{name!r} {described(self.state[name])}" for name in self.counts)
            raise RuntimeError(f"state must hold numbers that the host can read, got {got}: {error}") from error
        return (step + 1, *carried)


def look(
    work: Work,
    choices: list[Choice],
    only: Iterable[tuple[int, Tensor]] | None = None,
    *,
    allocate: bool = True,
) -> list[Update]:
    """All parameters with a gradient, or those of ``only`` (group, parameter), with the state they lack.

    The optimizer does not have that state yet. Without ``allocate`` it is None: then the updates say only that nothing
    was to be raised.

    Raises:
        RuntimeError: for a gradient that the algorithm does not take, ``capturable`` without graphs, and for a gradient
            or a state tensor that does not fit its parameter.
        KeyError: for a state of which a part is missing. TypeError, ValueError: for a hyperparameter or a count that is
            no number.
    """
    declaration, groups = work.rule.declaration, work.groups
    pairs = only if only is not None else [(i, p) for i, group in enumerate(groups) for p in group["params"]]
    kept: dict[int, tuple[str, ...]] = {}  # of the groups in which something is updated
    begun: dict[Tensor, dict[str, Any]] = {}  # the state of those that lack some
    kinds: set[tuple[Any, ...]] = set()
    updates = []
    refuse(work, choices)
    gradient = _gradient if work.substitutes is None else work.gradient
    for i, p in pairs:
        grad = gradient(p)
        if grad is None:
            continue
        if i not in kept:
            choices[i].hyper._fields  # noqa: B018  # or raises
            kept[i] = declaration.kept(choices[i].switches)
        sharded = type(p) not in PLAIN and tensor_parts.is_dtensor(p)
        if sharded:
            grad = dtensors.local_gradient(p, grad)
        if grad.layout is not torch.strided or not work.rule.accepts_dense:
            grad = check_gradient(work, choices[i], grad)
        state = work.state.get(p) or {}
        made, fresh = None, False
        if begun and p in begun:
            state, made = begun[p], {}
        elif _lacks(state, declaration.counts, kept[i]):
            check_whole(work, p, state)
            made = make_state(work, p, groups[i], choices[i].switches, allocate=allocate)
            fresh = any(name in made for name in kept[i])
            state = begun[p] = {**state, **made}
        listed, owner = None, p
        if sharded:
            listed, p, state = p, dtensors.local(p), dtensors.local_state(p, state, kept[i])
        shape, dtype = p.shape, p.dtype
        plain = p.layout is torch.strided and p.is_contiguous() and not (dtype.is_complex and p.is_conj())
        if grad.shape != shape or not plain:
            check_param(work, owner, p, grad)
        kind: list[Any] = [i, p.device, dtype, grad.device, grad.dtype]
        for name in kept[i]:
            t = state[name]
            if t is None:
                continue  # not allocated
            if not (isinstance(t, Tensor) and t.shape == shape and t.layout is torch.strided and t.is_contiguous()):
                check_buffer(work, owner, name, t, shape)
            kind += (t.dtype, t.device)
        update = Update(i, p, grad, state, kept[i], declaration.counts, fresh, made, tuple(kind), listed)
        if update.kind not in kinds:
            check_kind(work, owner, p, grad, {name: state[name] for name in kept[i]})
            kinds.add(update.kind)
        updates.append(update)
    if allocate:
        _take_turns(work, updates)
    return updates


def _take_turns(work: Work, updates: list[Update]) -> None:
    written = [[u.param, *[u.state[name] for name in (*u.counts, *u.buffers)]] for u in updates]
    try:
        turns = work.memory.turns(written, [u.grad for u in updates])
    except ShortStorageError as error:
        raise RuntimeError(_short(work, updates, error)) from error
    for u, turn in zip(updates, turns, strict=True):
        u.turn = turn


def _short(work: Work, updates: list[Update], error: ShortStorageError) -> str:
    for u in updates:
        named = {"data": u.param, "gradient": u.grad, **{f"state {name!r}": t for name, t in u.state.items()}}
        for name, t in named.items():
            if t is error.tensor:
                owner = place(work, u.param if u.listed is None else u.listed)
                return f"{work.rule.name}: the {name} of the parameter {owner} {error}"
    return str(error)


def _lacks(state: dict[str, Any], counts: tuple[str, ...], buffers: tuple[str, ...]) -> bool:
    """Whether `Optimizer.make_state` has something to make."""
    for name in counts:
        count = state.get(name)
        if type(count) is not Tensor or count.dtype not in COUNT_DTYPES or (count.dim() and not is_count(count)):
            return True
    return any(map(_is_none, map(state.get, buffers)))


# ---- the order of a step


def lists(
    updates: list[Update], scalars: Scalars, on_device: Sequence[bool]
) -> list[tuple[list[Update], Values | None, int]]:
    """Updates of one kind, count and turn, in the order in which they are to be done; with what `evaluate` returns.

    All scalars are evaluated here, before any count has advanced. None stands for those of a param group whose counts
    are ``on_device``, which the host does not read.
    """
    found: dict[Any, list[Update]] = {}
    evaluated: dict[Any, Values] = {}
    ahead: dict[int, float] = {}  # by address: what an earlier update of this step leaves there
    are_apart = not any([u.turn for u in updates])  # noqa: C419
    for u in updates:
        at = None
        if not on_device[u.group]:
            at = (u.group, u.next_counts(ahead))
            if at not in evaluated:
                evaluated[at] = scalars(*at)
            if u.counts and not are_apart:
                ahead |= _left(u, (at[1][0], *evaluated[at][1]))
        key = (u.turn, at, u.grad.layout, u.kind)
        if key in found:
            found[key].append(u)
        else:
            found[key] = [u]
    ordered = sorted(found.items(), key=lambda item: item[0][0])
    return [(members, None if at is None else evaluated[at], turn) for (turn, at, _, _), members in ordered]


def _left(u: Update, values: Sequence[Any]) -> dict[int, float]:
    """By address, what the 0-d state of an update will hold, rounded as its tensors round."""
    counts = [u.state[name] for name in u.counts]
    return {t.data_ptr(): t.new_tensor(value).item() for t, value in zip(counts, values, strict=True)}


def advance(members: list[Update], carried: Sequence[Any]) -> None:
    """Counts a step; ``carried``: what `scalars` carries on, each a number, or a tensor with one for each member."""
    for name, value in zip(members[0].counts, (None, *carried), strict=False):
        counts = [u.state[name] for u in members]
        if value is None:
            torch._foreach_add_(counts, 1)
        elif isinstance(value, Tensor):
            torch._foreach_copy_(counts, value.detach().expand(len(counts)).unbind())
        else:
            for count in counts:
                count.fill_(value)
    for u in members:
        if u.listed is not None:
            increment_version(u.listed)


# ---- state that was made


def publish_all(work: Work, updates: list[Update], journal: Journal) -> None:
    """Does so for updates, whose state is the optimizer's from now on."""
    publish(work, [(u.param if u.listed is None else u.listed, u.made) for u in updates if u.made], journal)
    for u in updates:
        if u.made is not None and u.listed is None:
            u.state = work.state[u.param]
