"""Tests of what only a GPU can show: ``make gpu``. They need torch, triton, pytest and a C++ compiler, nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def without_waiting(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A context in which whatever makes the host wait for the device raises."""

    @contextmanager
    def forbid() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return forbid


@pytest.fixture
def capture(device: torch.device) -> Callable[[], AbstractContextManager[torch.cuda.CUDAGraph]]:
    """A context that records what is launched in it, into a graph that can be replayed."""

    @contextmanager
    def record() -> Iterator[torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield graph

    return record
