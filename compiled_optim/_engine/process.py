"""Forked children, in which the parent's other threads (OpenMP's among them) do not exist."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

_forked = False


def team_size() -> int:
    """How many threads a launch may use: as many as torch does, but one in a forked child.

    There OpenMP would wait for ever for threads that it started in the parent.
    """
    return 1 if _forked else torch.get_num_threads()


def new_lock() -> Any:
    """A reentrant lock that becomes free in a forked child, because the thread that held it may not exist there."""
    lock = threading.RLock()
    os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]  # as threading's own do
    return lock


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)
