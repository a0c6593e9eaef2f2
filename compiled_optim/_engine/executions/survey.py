"""The parameters of a step, with their gradients and their state.

A step looks first: `look` and `in_order` change nothing, allocate nothing of a parameter's size, and raise whatever
there is to raise. `commit` then makes the state that lacks and gives it to the optimizer, and tensors are written.
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

from compiled_optim._engine.declaration import Group
from compiled_optim._engine.executions import dtensors
from compiled_optim._engine.executions.checks import (
    COUNT_DTYPES,
    PLAIN,
    are_fake,
    check_buffer,
    check_dimensions,
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
from compiled_optim._engine.kernels.trace import Signature
from compiled_optim._engine.torch_private import tensor_parts

_gradient = attrgetter("grad")
_is_none = partial(is_, None)
_ONE = torch.tensor(1.0, dtype=torch.float32, device="cpu")

# of a param group and counts, as `rule.evaluate` returns them
Values = tuple[dict[str, Any], tuple[Any, ...]]
Scalars = Callable[[int, Sequence[Any]], Values]


@dataclass(slots=True, repr=False, eq=False)
class Member:
    """One parameter of a step.

    Attributes:
        group: the index of its param group.
        listed: the parameter as its param group lists it; ``param``: the same, or the shard of a DTensor that this
            process holds. Gradient and state are then shards too.
        grad: a tensor, or None for a parameter that the step leaves as it is.
        state: by name. The rule sees ``buffers`` of it; a buffer is None until `commit`.
        counts: the names of its 0-d state, the step count first, or none.
        lacks: the names of the state that it has to be given before the step.
        kind: what tensors must share to be in one list.
        turn: how many others must be done before, one after the other, because they share memory.
        signature: of the kernel that updates it in a launch; ``reason``: why none does.
    """

    group: int
    listed: Tensor
    param: Tensor
    grad: Any
    state: dict[str, Any]
    buffers: tuple[str, ...]
    counts: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    kind: tuple[Any, ...] = ()
    turn: int = 0
    signature: Signature | None = None
    reason: str = ""

    @property
    def fresh(self) -> bool:
        """Whether buffers are made in this step."""
        return any(name in self.buffers for name in self.lacks)

    def next_counts(self, ahead: Mapping[int, float] = MappingProxyType({})) -> tuple[float, ...]:
        """The step count after this step, and the scalars that were carried to it.

        Without a step count it is 1 for new state and 2 afterwards. ``ahead``: values that earlier updates of this step
        will have written, by address.
        """
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
    work: Work, choices: list[Group], only: Iterable[tuple[int, Tensor]] | None = None, *, idle: bool = False
) -> list[Member]:
    """All parameters with a gradient, or those of ``only`` (group, parameter).

    Args:
        idle: also those without a gradient; nothing is checked of these.

    Raises:
        RuntimeError: for a gradient that the algorithm does not take, ``capturable`` without graphs, and for a gradient
            or a state tensor that does not fit its parameter.
        KeyError: for a state of which a part is missing. TypeError, ValueError: for a hyperparameter or a count that is
            no number.
    """
    rule, groups = work.rule, work.groups
    counts = rule.declaration.counts
    pairs = only if only is not None else [(i, p) for i, group in enumerate(groups) for p in group["params"]]
    kept: dict[tuple[int, torch.dtype, int], tuple[str, ...]] = {}
    means = rule.declaration.means
    begun: dict[Tensor, dict[str, Any]] = {}  # the state of those that lack some
    kinds: set[tuple[Any, ...]] = set()
    members = []
    refuse(work, choices)
    gradient = _gradient if work.substitutes is None else work.gradient
    for i, p in pairs:
        grad = gradient(p)
        if grad is None:
            if idle:
                members.append(_idle(work, i, p, rule.declaration.kept(choices[i].switches, p.dtype, p.dim())))
            continue
        dtype, shape = p.dtype, p.shape
        key = (i, dtype, len(shape))
        if key not in kept:
            choices[i].hyper._fields  # noqa: B018  # or raises
            check_dimensions(rule, groups[i], [p], work.listed_in or groups)
            kept[key] = rule.declaration.kept(choices[i].switches, dtype, len(shape))
        buffers = kept[key]
        sharded = type(p) not in PLAIN and tensor_parts.is_dtensor(p)
        if sharded:
            grad = dtensors.local_gradient(p, grad)
        if grad.layout is not torch.strided or not rule.accepts_dense:
            grad = check_gradient(work, choices[i], grad)
        state = work.state.get(p) or {}
        lacks: tuple[str, ...] = ()
        if begun and p in begun:
            state = begun[p]
        elif _lacks(state, counts, buffers):
            check_whole(work, p, state)
            made = make_state(work, p, groups[i], choices[i].switches, allocate=False)
            lacks = tuple(made)
            state = begun[p] = {**state, **made}
        listed = p
        if sharded:
            p, state = dtensors.local(p), dtensors.local_state(p, state, buffers)
            shape = p.shape
        plain = p.layout is torch.strided and p.is_contiguous() and not (dtype.is_complex and p.is_conj())
        if grad.shape != shape or not plain:
            check_param(work, listed, p, grad)
        kind: list[Any] = [i, p.device, dtype, grad.device, grad.dtype]
        for name in buffers:
            t = state[name]
            if t is None:
                kind += (rule.declaration.dtype_of(name, dtype), p.device)
                continue
            own = rule.declaration.shape_of(name, shape) if name in means else shape
            if not (isinstance(t, Tensor) and t.shape == own and t.layout is torch.strided and t.is_contiguous()):
                check_buffer(work, listed, name, t, own)
            kind += (t.dtype, t.device)
        member = Member(i, listed, p, grad, state, buffers, counts, lacks, tuple(kind))
        if member.kind not in kinds:
            check_kind(work, listed, p, grad, {name: state[name] for name in buffers})
            kinds.add(member.kind)
        members.append(member)
    _take_turns(work, members if not idle else [m for m in members if m.grad is not None])
    return members


def _idle(work: Work, group: int, p: Tensor, buffers: tuple[str, ...]) -> Member:
    counts, state = work.rule.declaration.counts, work.state.get(p) or {}
    lacks = tuple(name for name in (*counts, *buffers) if state.get(name) is None)
    state = dtensors.local_state(p, {**dict.fromkeys(lacks), **state}, buffers)
    return Member(group, p, dtensors.local(p), None, state, buffers, counts, lacks)


def _take_turns(work: Work, updates: list[Member]) -> None:
    if are_fake([u.param for u in updates]):  # which are nowhere in memory
        return
    written = [[u.param, *[u.state[name] for name in (*u.counts, *u.buffers)]] for u in updates]
    if any([u.lacks for u in updates]):  # noqa: C419
        written = [[t for t in row if t is not None] for row in written]
    try:
        turns = work.memory.turns(written, [u.grad for u in updates])
    except ShortStorageError as error:
        raise RuntimeError(_short(work, updates, error)) from error
    for u, turn in zip(updates, turns, strict=True):
        u.turn = turn


def _short(work: Work, updates: list[Member], error: ShortStorageError) -> str:
    for u in updates:
        named = {"data": u.param, "gradient": u.grad, **{f"state {name!r}": t for name, t in u.state.items()}}
        for name, t in named.items():
            if t is error.tensor:
                return f"{work.rule.name}: the {name} of the parameter {place(work, u.listed)} {error}"
    return str(error)


def _lacks(state: dict[str, Any], counts: tuple[str, ...], buffers: tuple[str, ...]) -> bool:
    """Whether `make_state` has something to make."""
    for name in counts:
        count = state.get(name)
        if type(count) is not Tensor or count.dtype not in COUNT_DTYPES or (count.dim() and not is_count(count)):
            return True
    return any(map(_is_none, map(state.get, buffers)))


# ---- the order of a step


def in_order(
    updates: list[Member], scalars: Scalars, on_device: Sequence[bool]
) -> list[tuple[list[Member], Values | None, int]]:
    """Updates of one kind, count and turn, in the order in which they are to be done; with what `evaluate` returns.

    All scalars are evaluated here, before any count has advanced. None stands for those of a param group whose counts
    are ``on_device``, which the host does not read.
    """
    found: dict[Any, list[Member]] = {}
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


def _left(u: Member, values: Sequence[Any]) -> dict[int, float]:
    """The values that the 0-d state of an update will hold, by address, rounded to the dtype of its tensors."""
    counts = [u.state[name] for name in u.counts]
    return {t.data_ptr(): t.new_tensor(value).item() for t, value in zip(counts, values, strict=True)}


def advance(members: list[Member], carried: Sequence[Any] | None) -> None:
    """Advances the counts.

    Args:
        carried: the carried scalars, each a number or a tensor with an element per member; None if a graph has counted
            the step.
    """
    if carried is not None:
        advance_counts([[u.state[name] for u in members] for name in members[0].counts], carried)
    touch_listed(members)


def touch_listed(members: list[Member]) -> None:
    """Counts the change of a shard in the version of its DTensor."""
    for u in members:
        if u.listed is not u.param:
            increment_version(u.listed)


def advance_counts(columns: Sequence[list[Tensor]], carried: Sequence[Any]) -> None:
    """The same for lists of step counts and of each carried state."""
    for counts, value in zip(columns, (None, *carried), strict=False):
        if value is None and counts[0].is_cpu:
            torch._foreach_add_(counts, _ONE, alpha=1.0)  # four times faster than a number
        elif value is None:
            torch._foreach_add_(counts, 1)
        elif isinstance(value, Tensor):
            torch._foreach_copy_(counts, value.detach().expand(len(counts)).unbind())
        else:
            for count in counts:
                count.fill_(value)


def commit(work: Work, choices: list[Group], members: Iterable[Member], journal: Journal) -> None:
    """Makes the state that members lack and gives it to the optimizer; ``journal``: what `withdraw` takes back then."""
    begun = [m for m in members if m.lacks]
    made = []
    for m in begun:
        new = make_state(work, m.listed, work.groups[m.group], choices[m.group].switches)
        # the counts that were looked at, and the buffers
        made.append((m.listed, {name: m.state[name] if name in m.counts else new[name] for name in m.lacks}))
    publish(work, made, journal)
    given = {id(p): values for p, values in made}
    for m in members:
        if id(m.listed) in given:
            state = work.state[m.listed]
            m.state = state if m.listed is m.param else dtensors.local_state(m.listed, state, m.buffers)
