"""The parameters that have a gradient in this step, with their state, for the executions that work on tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd.graph import increment_version

from compiled_optim import dtensors, torch_private

if TYPE_CHECKING:
    from compiled_optim.declare import Choice
    from compiled_optim.optimizer import Optimizer


@dataclass(slots=True)
class Update:
    """One parameter that has a gradient.

    ``state``: the parameter's live state, of which the rule sees ``buffers``, or nothing at all for an algorithm
    without; ``counts``: the names of its 0-d state, the step count first, if it keeps one; ``fresh``: whether buffers
    were made in this step; ``made``: the names of all state that was; ``listed``: the parameter in its param group,
    where that is a DTensor, of which the tensors here are shards.
    """

    group: int
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    buffers: tuple[str, ...]
    counts: tuple[str, ...]
    fresh: bool
    made: tuple[str, ...] = ()
    listed: Tensor | None = None

    @property
    def next_counts(self) -> tuple[float, ...]:
        """The step count after this step, and what `scalars` carried here; without a step count, 1 for new state and
        2 after."""
        if not self.counts:
            return (1.0,) if self.fresh else (2.0,)
        step, *carried = (self.state[name].item() for name in self.counts)
        return (step + 1, *carried)

    def advance(self, after: Sequence[Any]) -> None:
        """Counts the step; ``after``: what `scalars` carries on, numbers or 0-d tensors."""
        for name, value in zip(self.counts, (None, *after), strict=False):
            if value is None:
                self.state[name].add_(1)
            else:
                self.state[name].copy_(value.detach()) if isinstance(value, Tensor) else self.state[name].fill_(value)
        if self.listed is not None:
            increment_version(self.listed)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tensors must share to be in one list."""
        dtypes = (self.state[name].dtype for name in self.buffers)
        return (self.group, self.param.device, self.param.dtype, self.grad.dtype, *dtypes)


def refuse(optimizer: Optimizer, choices: list[Choice]) -> None:
    """Raises RuntimeError for a gradient that the algorithm does not take, or ``capturable`` without graphs."""
    name = optimizer.declaration.name
    for group, choice in zip(optimizer.param_groups, choices, strict=True):
        for p in group["params"]:
            if p.grad is None:
                continue
            if torch_private.is_dtensor(p):
                dtensors.refuse(optimizer, p)
            if p.grad.is_sparse:
                if not optimizer.accepts_sparse:
                    raise RuntimeError(f"{name} does not support sparse gradients, please consider SparseAdam instead")
                optimizer.keeps_untouched_rows(choice.switches)
                torch_private.check_indices(p.grad)
            elif not optimizer.accepts_dense:
                raise RuntimeError(f"{name} does not support dense gradients, please consider Adam instead")
            if group.get("capturable") and p.device.type == "cpu":
                raise RuntimeError(f"capturable=True needs parameters on a device with graphs, got one on {p.device}")


def collect(
    optimizer: Optimizer, choices: list[Choice], only: Iterable[tuple[int, Tensor]] | None = None
) -> list[Update]:
    """All parameters with a gradient, or those of ``only`` (group, parameter); makes the state they lack.

    Raises:
        What `refuse` raises. Nothing was changed then.
    """
    declaration = optimizer.declaration
    groups = optimizer.param_groups
    pairs = only if only is not None else [(i, p) for i, group in enumerate(groups) for p in group["params"]]
    with_gradient = [(i, p, grad) for i, p in pairs if (grad := optimizer.gradient(p)) is not None]
    refuse(optimizer, choices)
    with_gradient = [(i, p, dtensors.local_gradient(p, grad)) for i, p, grad in with_gradient]
    kept = [declaration.kept(choice.switches) for choice in choices]
    slots = [(*declaration.counts, *names) for names in kept]
    updates = []
    for i, p, grad in with_gradient:
        state = optimizer.state.get(p, {})
        fresh, made = False, {}
        if not all(state.get(name) is not None for name in slots[i]):
            made = optimizer.make_state(p, groups[i], choices[i].switches)
            fresh = any(name in made for name in kept[i])
            state = optimizer.state[p]
            state.update(made)
        shard = dtensors.local(p)
        state = dtensors.local_state(p, state, kept[i])
        listed = None if shard is p else p
        updates.append(Update(i, shard, grad, state, kept[i], declaration.counts, fresh, tuple(made), listed))
    return updates


def discard(optimizer: Optimizer, updates: Iterable[Update]) -> None:
    """Removes the state that `collect` made."""
    for u in updates:
        p = u.param if u.listed is None else u.listed
        state = optimizer.state[p]
        for name in u.made:
            del state[name]
        if not state:
            del optimizer.state[p]
