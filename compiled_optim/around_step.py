"""What an optimizer does around its update, in the same launch, and torch.optim has no names for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from compiled_optim._engine.one_pass import OnePass
from compiled_optim._engine.rule import Rule


class AroundStep:
    """The part of `Optimizer` that clips, skips, averages, and keeps state in other dtypes."""

    rule: ClassVar[Rule]
    param_groups: list[dict[str, Any]]
    state: Any
    _one_pass: OnePass | None = None
    _averages_are_in: bool = False

    def _surround(self, one_pass: OnePass) -> None:
        """Takes the options on; without any, everything stays the class's own."""
        if not one_pass.extras.any:
            return
        if one_pass.extras.ema and not self.rule.accepts_dense:
            raise ValueError(
                f"{self.rule.name}: ema_decay must be None, got {one_pass.ema_decay!r}: an average moves in every row, "
                "and this algorithm visits those with a gradient only"
            )
        self._one_pass = one_pass
        self.rule = self.rule.extended(one_pass.extras)  # type: ignore[misc]

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step before they were clipped, 0-d and float64.

        None before the first step, and without ``max_grad_norm`` and ``skip_nonfinite``. It lies on the device of the
        gradients unless the host had to wait for it. A replay of a CUDA graph counts as a step.
        """
        norm = None if self._one_pass is None else self._one_pass.norm
        if isinstance(norm, Tensor):
            return norm.clone()  # the next step, or a replay of a graph, writes to it
        return None if norm is None else torch.tensor(norm, dtype=torch.float64)

    @property
    def skipped_steps(self) -> int:
        """How many steps changed nothing because a gradient was not finite. Waits for the device."""
        return 0 if self._one_pass is None else int(self._one_pass.skipped)

    @property
    def max_grad_norm(self) -> float | None:
        """The norm to which gradients are clipped. Another number may be assigned between steps."""
        return None if self._one_pass is None else self._one_pass.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._change("max_grad_norm", value)

    @property
    def ema_decay(self) -> float | Callable[[int], float] | None:
        """The decay of the averages per step. Another one may be assigned between steps."""
        return None if self._one_pass is None else self._one_pass.ema_decay

    @ema_decay.setter
    def ema_decay(self, value: float | Callable[[int], float]) -> None:
        self._change("ema_decay", value)

    def _change(self, name: str, value: Any) -> None:
        old = self._one_pass
        # to begin or to end with it would need other kernels, or leave the quick step that was made without it
        if old is None or getattr(old, name) is None or value is None:
            kind = f"{getattr(old, name, None)!r} by {value!r}"
            raise ValueError(f"{name} must stay what kernels were made for, so it cannot be replaced: {kind}")
        self._one_pass = old.but(**{name: value})

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averages of ``ema_decay`` in the place of the parameters, and the parameters back at the end.

        Parameters that have not stepped yet have no average and stay. What is written to a parameter in the context is
        lost at its end. No step may be taken in it.

        Raises:
            RuntimeError: without ``ema_decay``, and within another such context.

        Example:
            >>> import torch
            >>> from compiled_optim import SGD
            >>> weight = torch.nn.Parameter(torch.ones(1))
            >>> optimizer = SGD([weight], lr=1.0, ema_decay=0.5)
            >>> for _ in range(2):
            ...     weight.grad = torch.ones(1)
            ...     optimizer.step()
            >>> with optimizer.averaged():
            ...     print(weight.item())
            -0.5
            >>> weight.item()
            -1.0
        """
        if not self.rule.extras.ema:
            raise RuntimeError("averaged() needs averages, which an optimizer keeps if it was built with ema_decay")
        if self._averages_are_in:
            raise RuntimeError("averaged() must not be entered twice: the averages are in place")
        params = [p for group in self.param_groups for p in group["params"] if "ema" in self.state.get(p, ())]
        kept = [p.detach().clone() for p in params]
        self._averages_are_in = True
        try:
            _copy(params, [self.state[p]["ema"] for p in params])
            yield
        finally:
            _copy(params, kept)
            self._averages_are_in = False


@torch.no_grad()
def _copy(params: list[Tensor], values: list[Tensor]) -> None:
    if params:
        torch._foreach_copy_(params, values)
