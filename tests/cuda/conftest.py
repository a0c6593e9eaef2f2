"""A machine with two GPUs, of which nothing is real."""

from __future__ import annotations

from typing import Any

import pytest

from compiled_optim._engine.kernels import backends


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The driver of the stand-in for GPUs, whose kernels are interpreted."""
    stand_in_gpu = pytest.importorskip("stand_in_gpu", exc_type=ImportError)
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, stand_in_gpu.GPU))
    stand_in_gpu.driver().reset()
    return stand_in_gpu.driver()
