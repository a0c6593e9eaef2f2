"""What a fork means for the child: its parent's other threads, OpenMP's among them, do not exist in it."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

_forked = False


def team_size() -> int:
    """How many threads a launch may use: as many as torch does, but one in a forked child.

    A team of OpenMP's threads that the parent has made would be waited for in the child for ever.
    """
    return 1 if _forked else torch.get_num_threads()


def new_lock() -> Any:
    """A reentrant lock that is free in a forked child, where the thread that held it may not exist."""
    lock = threading.RLock()
    os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]  # as threading's own do
    return lock


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)
