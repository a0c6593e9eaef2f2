"""torch.optim's methods without their decorators, its hooks and its line search."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from compiled_optim._engine.torch_private import version

try:
    from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
    from torch.optim.lbfgs import _strong_wolfe
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
except ImportError as error:
    version.missing.append(version.lacks(error))


def _missing(*args: Any, **options: Any) -> Any:
    raise RuntimeError(version.missing[0])


# The line search of torch.optim.LBFGS: (evaluate, x, t, d, loss, grad, gtd, max_ls=) -> (loss, grad, t, evaluations)
strong_wolfe: Callable[..., tuple[float, torch.Tensor, Any, int]] = _missing if version.missing else _strong_wolfe


@functools.cache
def undecorated(name: str) -> Callable[..., Any]:
    """A method of torch.optim.Optimizer without the decorator that imports Dynamo (1 s in a fresh process)."""
    method: Callable[..., Any] = inspect.unwrap(getattr(torch.optim.Optimizer, name))
    return method


# Where a step finds hooks: attributes of the optimizer, and the dictionaries of those of all optimizers.
HOOKS: tuple[Any, ...] = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
HOOKS += () if version.missing else (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
# Whether a profiler has to be told of a step.
is_profiled: Callable[[], bool] = _missing if version.missing else _profiler_enabled


def step_has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook is to run before or after a step."""
    return bool(
        version.missing  # then torch has to look
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def step_is_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook or a profiler has to be told of a step."""
    return step_has_hooks(optimizer) or is_profiled()
