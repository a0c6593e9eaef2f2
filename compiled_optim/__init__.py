"""torch.optim, JIT-compiled: change one import and pass ``compiled=True``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiled_optim import algorithms
from compiled_optim._engine.cache.store import CacheWarning, open_store
from compiled_optim._engine.fallback import CompileError, CompileFallbackWarning
from compiled_optim._engine.kernels import registry
from compiled_optim._engine.kernels.registry import CacheInfo, cache_info
from compiled_optim.algorithms import *  # noqa: F403
from compiled_optim.optimizer import Optimizer
from compiled_optim.report import explain
from compiled_optim.stateless import swap_in_optimizer_params_and_state
from compiled_optim.version import __version__

if TYPE_CHECKING:
    from compiled_optim.lbfgs import LBFGS


def cache_dir() -> Path | None:
    """The directory that holds compiled kernels; None if none can be trusted, or if it is switched off.

    Example:
        >>> import os, compiled_optim
        >>> os.environ["COMPILED_OPTIM_DISK_CACHE"] = "0"
        >>> print(compiled_optim.cache_dir())
        None
        >>> del os.environ["COMPILED_OPTIM_DISK_CACHE"]
    """
    store = open_store()
    return None if store is None else store.root


def cache_clear(disk: bool = False) -> None:
    """Forgets the kernels of this process, and the counts of `cache_info`.

    Args:
        disk: delete the kernels on disk too.

    Example:
        >>> import compiled_optim
        >>> compiled_optim.cache_clear()
        >>> compiled_optim.cache_info().kernels
        0
    """
    registry.forget()
    importlib.import_module("compiled_optim._engine.executions.traced_lists").forget()
    store = open_store() if disk else None
    if store is not None:
        store.clear()


_MODULES = ("declare", "functional", "lr_scheduler", "swa_utils", "testing")


def __getattr__(name: str) -> Any:
    """Modules, `LBFGS` and `plot_schedule` are imported when they are asked for."""
    if name in _MODULES:
        return importlib.import_module(f"compiled_optim.{name}")
    if name == "LBFGS":  # with its kernels, which few need
        return importlib.import_module("compiled_optim.lbfgs").LBFGS
    if name == "plot_schedule":
        return importlib.import_module("compiled_optim.lr_scheduler").plot_schedule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "plot_schedule"])


__all__ = [
    "LBFGS",
    "CacheInfo",
    "CacheWarning",
    "CompileError",
    "CompileFallbackWarning",
    "Optimizer",
    "__version__",
    "cache_clear",
    "cache_dir",
    "cache_info",
    "explain",
    "swap_in_optimizer_params_and_state",
]
__all__ += algorithms.__all__
