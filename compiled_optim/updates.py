"""The parameters that have a gradient in this step, with their state, for the executions that work on tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from compiled_optim.declare import Choice
    from compiled_optim.optimizer import Optimizer


@dataclass(slots=True)
class Update:
    """One parameter that has a gradient.

    ``state``: the parameter's live state, of which the rule sees ``buffers``, or nothing at all for an algorithm
    without; ``counted``: whether a step count is among it; ``fresh``: whether buffers were made in this step; ``made``:
    the names of all state that was.
    """

    group: int
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    buffers: tuple[str, ...]
    counted: bool
    fresh: bool
    made: tuple[str, ...] = ()

    @property
    def next_step(self) -> float:
        """The step count after this step; where none is kept, 1 for new state and 2 after."""
        return self.state["step"].item() + 1 if self.counted else 1 if self.fresh else 2

    def advance(self) -> None:
        if self.counted:
            self.state["step"].add_(1)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tensors must share to be in one list."""
        dtypes = (self.state[name].dtype for name in self.buffers)
        return (self.group, self.param.device, self.param.dtype, self.grad.dtype, *dtypes)


def refuse(optimizer: Optimizer) -> None:
    """Raises RuntimeError for a sparse gradient that the algorithm does not take, or ``capturable`` without graphs."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse and not optimizer.accepts_sparse:
                name = optimizer.declaration.name
                raise RuntimeError(f"{name} does not support sparse gradients, please consider SparseAdam instead")
            if p.grad is not None and group.get("capturable") and p.device.type == "cpu":
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
    with_gradient = [(i, p, p.grad) for i, p in pairs if p.grad is not None]
    refuse(optimizer)
    kept = [declaration.kept(choice.switches) for choice in choices]
    slots = [("step", *names) if declaration.counted else names for names in kept]
    updates = []
    for i, p, grad in with_gradient:
        state = optimizer.state.get(p, {})
        fresh, made = False, {}
        if not all(state.get(name) is not None for name in slots[i]):
            made = optimizer.make_state(p, groups[i], choices[i].switches)
            fresh = any(name in made for name in kept[i])
            state = optimizer.state[p]
            state.update(made)
        updates.append(Update(i, p, grad, state, kept[i], declaration.counted, fresh, tuple(made)))
    return updates


def discard(optimizer: Optimizer, updates: Iterable[Update]) -> None:
    """Removes the state that `collect` made."""
    for u in updates:
        for name in u.made:
            del u.state[name]
        if not u.state:
            optimizer.state.pop(u.param, None)
