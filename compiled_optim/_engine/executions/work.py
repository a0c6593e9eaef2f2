"""What every execution is handed instead of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compiled_optim._engine.declaration import Group
from compiled_optim._engine.executions.memory import Memory
from compiled_optim._engine.executions.scaling import Scaling
from compiled_optim._engine.rule import Rule, evaluate, first_scalars

_NUMBERS = {float, int, bool, type(None), list, str}  # the types that param groups hold most


@dataclass(slots=True, eq=False)
class Work:
    """What a step is taken on: the rule, the param groups and the state of one optimizer.

    ``memory`` finds tensors that share some. ``substitutes`` holds gradients that replace ``p.grad``, by parameter.
    ``scaling`` is what a launch has to do for a GradScaler. ``given`` are the `Extras.numbers` of the next step, where
    the factor may be a tensor on a device; ``constant`` are those of every step without a GradScaler, None if they
    differ. ``listed_in`` are the optimizer's own param groups, where ``groups`` have only some of its parameters.
    """

    rule: Rule
    groups: list[dict[str, Any]]
    state: Any  # of each parameter, a dict by name; lookups of others make an empty one
    defaults: dict[str, Any]
    memory: Memory
    substitutes: dict[Tensor, Tensor] | None = None
    scaling: Scaling | None = None
    given: dict[str, Any] = field(default_factory=dict)
    constant: dict[str, Any] | None = None
    listed_in: list[dict[str, Any]] | None = None
    steady: Any = None  # what the last eager step found

    def gradient(self, p: Tensor) -> Tensor | None:
        if self.substitutes is None or p not in self.substitutes:
            return p.grad
        return self.substitutes[p]

    def evaluate(self, h: Any, counts: Sequence[Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """The scalars of this step, and what is carried to the next: see `rule.evaluate`."""
        return evaluate(self.rule, h, counts, self.given)

    @property
    def factor(self) -> Tensor | None:
        """What gradients are multiplied by in this step, if only a device knows it yet."""
        factor = self.given.get("grad_factor")
        return None if factor is None or not isinstance(factor, Tensor) else factor

    def read(self, *, keep_tensors: bool = False) -> list[Group]:
        """The hyperparameters and switches of each param group."""
        return [self.rule.declaration.read(group, keep_tensors=keep_tensors) for group in self.groups]

    def scalar_names(self, choices: list[Group]) -> list[tuple[str, ...]]:
        """Of each param group; none where they cannot be evaluated, if nothing is to be updated there."""
        names = []
        for group, choice in zip(self.groups, choices, strict=True):
            try:
                names.append(tuple(first_scalars(self.rule, choice.hyper)))
            except Exception:
                if any(p.grad is not None for p in group["params"]):
                    raise
                names.append(())
        return names


def hyper_tensors(group: dict[str, Any]) -> list[Tensor]:
    """The hyperparameters of a param group that are tensors."""
    found: list[Tensor] = []
    for value in group.values():
        if type(value) in _NUMBERS:
            continue
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple):
            found += [v for v in value if isinstance(v, Tensor)]
    return found
