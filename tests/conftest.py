"""The suite runs strict, so that a fallback cannot pass for a compiled run, and with a cache of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Read when torch is loaded. Workers share cores: a product on threads that spin took 0.6 s there, and 1 ms on others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch._inductor.config  # takes CXX from the environment when it is imported; some tests change that

# before anything reads them, and for the subprocesses of tests too
os.environ["COMPILED_OPTIM_STRICT"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the directory, so that no kernel is compiled twice
    _cache = tempfile.TemporaryDirectory(prefix="compiled_optim-tests-")
    os.environ["COMPILED_OPTIM_CACHE_DIR"] = str(Path(_cache.name) / "cache")
# said explicitly, or torch warns of it when one of its own optimizers makes a sparse tensor
torch.sparse.check_sparse_tensor_invariants.disable()


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fallbacks warn, as they do for users."""
    monkeypatch.setenv("COMPILED_OPTIM_STRICT", "0")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A device mesh of this process alone."""
    pytest.importorskip("torch.distributed.tensor", reason="this torch was built without torch.distributed")
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    store = tmp_path_factory.mktemp("store") / "store"  # a file, for a port may be taken
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
