"""The parameters that have a gradient in this step, with their state, for the executions that work on tensors.

A step looks first: `look` and `lists` change nothing, and raise whatever there is to raise. Then `publish` gives the
optimizer the state that was made, and tensors are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from compiled_optim import dtensors, torch_private
from compiled_optim.memory import Memory

if TYPE_CHECKING:
    from compiled_optim.declare import Choice
    from compiled_optim.optimizer import Optimizer

_PLAIN = (Tensor, torch.nn.Parameter)
_gradient = attrgetter("grad")
COUNT_DTYPES = (torch.float32, torch.float64)

# of a param group and counts, as `rule.evaluate` returns them
Values = tuple[dict[str, Any], tuple[Any, ...]]
Scalars = Callable[[int, Sequence[Any]], Values]
# a parameter, what it had of the state that was made, or None if it had no state at all, and what was made
Journal = list[tuple[Tensor, dict[str, Any] | None, dict[str, Any]]]


@dataclass(slots=True)
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
            got = ", ".join(f"{name!r} {_described(self.state[name])}" for name in self.counts)
            raise RuntimeError(f"state must hold numbers that the host can read, got {got}: {error}") from error
        return (step + 1, *carried)


def look(
    optimizer: Optimizer,
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
    declaration, groups = optimizer.declaration, optimizer.param_groups
    pairs = only if only is not None else [(i, p) for i, group in enumerate(groups) for p in group["params"]]
    kept: dict[int, tuple[str, ...]] = {}  # of the groups in which something is updated
    begun: dict[Tensor, dict[str, Any]] = {}  # the state of those that lack some
    kinds: set[tuple[Any, ...]] = set()
    updates = []
    refuse(optimizer, choices)
    gradient = _gradient if optimizer._gradients is None else optimizer.gradient
    for i, p in pairs:
        grad = gradient(p)
        if grad is None:
            continue
        if i not in kept:
            choices[i].hyper._fields  # noqa: B018  # or raises
            kept[i] = declaration.kept(choices[i].switches)
        sharded = type(p) not in _PLAIN and torch_private.is_dtensor(p)
        if sharded:
            grad = dtensors.local_gradient(p, grad)
        if grad.layout is not torch.strided or not optimizer.accepts_dense:
            grad = _taken(optimizer, choices[i], grad)
        state = optimizer.state.get(p) or {}
        made, fresh = None, False
        if begun and p in begun:
            state, made = begun[p], {}
        elif _lacks(state, declaration.counts, kept[i]):
            _check_whole(optimizer, p, state)
            made = optimizer.make_state(p, groups[i], choices[i].switches, allocate=allocate)
            fresh = any(name in made for name in kept[i])
            state = begun[p] = {**state, **made}
        listed, owner = None, p
        if sharded:
            listed, p, state = p, dtensors.local(p), dtensors.local_state(p, state, kept[i])
        shape = p.shape
        if grad.shape != shape or not (p.layout is torch.strided and p.is_contiguous()):
            _check_param(optimizer, owner, p, grad)
        kind: list[Any] = [i, p.device, p.dtype, grad.device, grad.dtype]
        for name in kept[i]:
            t = state[name]
            if t is None:
                continue  # not allocated
            if not (isinstance(t, Tensor) and t.shape == shape and t.layout is torch.strided and t.is_contiguous()):
                check_buffer(optimizer, owner, name, t, shape)
            kind += (t.dtype, t.device)
        update = Update(i, p, grad, state, kept[i], declaration.counts, fresh, made, tuple(kind), listed)
        if update.kind not in kinds:
            _check_kind(optimizer, update)
            kinds.add(update.kind)
        updates.append(update)
    if allocate:
        _take_turns(optimizer, updates)
    return updates


def _take_turns(optimizer: Optimizer, updates: list[Update]) -> None:
    memory = optimizer._memory = optimizer._memory or Memory()
    written = [[u.param, *[u.state[name] for name in (*u.counts, *u.buffers)]] for u in updates]
    for u, turn in zip(updates, memory.turns(written, [u.grad for u in updates]), strict=True):
        u.turn = turn


def _lacks(state: dict[str, Any], counts: tuple[str, ...], buffers: tuple[str, ...]) -> bool:
    """Whether `Optimizer.make_state` has something to make."""
    for name in counts:
        count = state.get(name)
        if type(count) is not Tensor or count.dtype not in COUNT_DTYPES or (count.dim() and not is_count(count)):
            return True
    return any(state.get(name) is None for name in buffers)


def is_count(value: Any) -> bool:
    """Whether a step can count in this, as it is."""
    exact = isinstance(value, Tensor) and value.dtype in COUNT_DTYPES and value.layout is torch.strided
    return exact and value.numel() == 1


def number_of(optimizer: Optimizer, p: Tensor, name: str, value: Any) -> float:
    """The number that a step count, or another 0-d state, stands for.

    Raises:
        TypeError: if it is none; the message names the state, its value and what was expected.
    """
    try:
        if isinstance(value, Tensor) and (value.is_complex() or value.layout is not torch.strided):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        expected = "must be a number or a tensor of 1 element"
        raise TypeError(
            f"{_named(optimizer, name)} of the parameter {_place(optimizer, p)} {expected}, got {_described(value)}"
        ) from None


# ---- what is raised


def refuse(optimizer: Optimizer, choices: list[Choice]) -> None:
    """Raises RuntimeError for ``capturable`` without graphs, and what `dtensors.refuse` raises."""
    for group in optimizer.param_groups:
        capturable = group.get("capturable")
        for p in group["params"]:
            if type(p) not in _PLAIN and p.grad is not None and torch_private.is_dtensor(p):
                dtensors.refuse(optimizer, p)
            if capturable and p.grad is not None and p.device.type == "cpu":
                raise RuntimeError(f"capturable=True needs parameters on a device with graphs, got one on {p.device}")


def _taken(optimizer: Optimizer, choice: Choice, grad: Tensor) -> Tensor:
    """A gradient that is not dense, or of an algorithm that takes no other; in COO layout."""
    name = optimizer.declaration.name
    if grad.layout is torch.strided:
        raise RuntimeError(f"{name} does not support dense gradients, please consider Adam instead")
    if not optimizer.accepts_sparse:
        raise RuntimeError(f"{name} does not support sparse gradients, please consider SparseAdam instead")
    optimizer.keeps_untouched_rows(choice.switches)
    if grad.layout is not torch.sparse_coo:
        grad = grad.to_sparse(layout=torch.sparse_coo)
    torch_private.check_indices(grad)
    return grad


def _check_whole(optimizer: Optimizer, p: Tensor, state: dict[str, Any]) -> None:
    """State is made as a whole, but for what a switch that was turned on adds: a part that lacks was lost."""
    declaration = optimizer.declaration
    needed = [*declaration.counts, *(name for name, b in declaration.buffers.items() if b.when is None)]
    missing = [name for name in needed if state.get(name) is None]
    if missing and len(missing) < len(needed):
        there = [name for name in needed if name not in missing]
        where = _place(optimizer, p)
        raise KeyError(f"{_named(optimizer, missing[0])} of the parameter {where} is missing beside its {there}")


def _check_param(optimizer: Optimizer, owner: Tensor, p: Tensor, grad: Tensor) -> None:
    name, where = optimizer.declaration.name, _place(optimizer, owner)
    if grad.shape != p.shape:
        raise RuntimeError(
            f"{name}: the gradient of the parameter {where} must have its shape, got {tuple(grad.shape)}"
        )
    if _overlaps(p):
        raise RuntimeError(
            f"{name}: the elements of the parameter {where} must not share a single memory location, "
            f"got strides {p.stride()}"
        )


def check_buffer(optimizer: Optimizer, p: Tensor, name: str, value: Any, shape: torch.Size) -> None:
    """Raises RuntimeError if a state does not fit its parameter; the message names both and what was expected.

    Args:
        shape: of the parameter, or of its shard if the state is one.
    """
    expected = None
    if not isinstance(value, Tensor):
        expected = "must be a tensor"
    elif value.shape != shape:
        expected = "must have its shape"
    elif value.layout is not torch.strided and p.layout is torch.strided:
        expected = "must be dense"
    elif _overlaps(value):
        expected = "must not have elements that share a single memory location"
    if expected:
        found = tuple(value.shape) if expected == "must have its shape" else _described(value)
        where = _place(optimizer, p)
        raise RuntimeError(f"{_named(optimizer, name)} of the parameter {where} {expected}, got {found}")


def _check_kind(optimizer: Optimizer, u: Update) -> None:
    """What all updates of one kind share."""
    p, owner = u.param, u.param if u.listed is None else u.listed
    if u.grad.device != p.device:
        name, where = optimizer.declaration.name, _place(optimizer, owner)
        raise RuntimeError(f"{name}: the gradient of the parameter {where} must be on {p.device}, got {u.grad.device}")
    for name in u.buffers:
        t = u.state[name]
        if t is None:
            continue
        expected = f"must be on {p.device}" if t.device != p.device else None
        if t.is_complex() != p.is_complex() or not (t.is_complex() or t.is_floating_point()):
            expected = "must be complex" if p.is_complex() else "must be of a real floating-point dtype"
        if expected:
            where = _place(optimizer, owner)
            raise RuntimeError(f"{_named(optimizer, name)} of the parameter {where} {expected}, got {_described(t)}")


def _overlaps(t: Tensor) -> bool:
    return t.layout is torch.strided and any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True))


def _named(optimizer: Optimizer, name: str) -> str:
    return f"{optimizer.declaration.name}: state {name!r}"


def _place(optimizer: Optimizer, p: Tensor) -> str:
    for i, group in enumerate(optimizer.param_groups):
        for j, other in enumerate(group["params"]):
            if other is p:
                return f"of shape {tuple(p.shape)} at index {j} of param group {i}"
    return f"of shape {tuple(p.shape)}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f" {str(value.layout).removeprefix('torch.')}"
        return f"a{layout} tensor of {value.dtype} and shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"an int of {value.bit_length()} bits"
    return f"{value!r} of type {type(value).__name__}"


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


def publish(optimizer: Optimizer, made: Iterable[tuple[Tensor, dict[str, Any]]], journal: Journal) -> None:
    """Gives an optimizer the state that was made, and notes in ``journal`` what `withdraw` needs to take it back."""
    for p, values in made:
        had = optimizer.state.get(p)
        journal.append((p, None if had is None else {name: had[name] for name in values if name in had}, values))
        optimizer.state[p].update(values)


def publish_all(optimizer: Optimizer, updates: list[Update], journal: Journal) -> None:
    """Does so for updates, whose state is the optimizer's from now on."""
    publish(optimizer, [(u.param if u.listed is None else u.listed, u.made) for u in updates if u.made], journal)
    for u in updates:
        if u.made is not None and u.listed is None:
            u.state = optimizer.state[u.param]


def withdraw(optimizer: Optimizer, journal: Journal) -> None:
    """Takes back the state of a step that raised, where it was not written yet: the next step makes it anew.

    That is a first step then, as this one was to be.
    """
    for p, had, made in journal:
        state = optimizer.state.get(p)
        if state is None:
            continue
        for name, value in made.items():
            written = dtensors.local(value)
            if state.get(name) is value and (written.is_inference() or not written._version):
                del state[name]
                state.update({name: had[name]} if had and name in had else {})
        if had is None and not state:
            del optimizer.state[p]
    journal.clear()
