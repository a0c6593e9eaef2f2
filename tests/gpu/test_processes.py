"""What needs a process of its own: a warm start, and the launch under compute-sanitizer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

STEPS = """
import json, sys, torch
params = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in (1, 7, 1000, 4099, 1 << 18)]
bucket = torch.randn(10_000, device="cuda")
params.append(torch.nn.Parameter(bucket[3:3003]))  # not aligned to 16 bytes
imported = {*sys.modules}
from compiled_optim import AdamW, explain
optimizers = AdamW(params, compiled=True), AdamW(params, fused=True)
for optimizer in optimizers:
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
torch.cuda.synchronize()
origins = [row.origin for optimizer in optimizers for row in explain(optimizer)]
compilers = {"triton", "sympy", "torch._inductor", "torch._dynamo"} & ({*sys.modules} - imported)
print(json.dumps({"origins": origins, "compilers": [*compilers]}))
"""


def run(*command: str, cache: Path, **environment: str) -> Any:
    environment = {**os.environ, "COMPILED_OPTIM_CACHE_DIR": str(cache), **environment}
    result = subprocess.run([*command, sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels") / "cache"


def test_a_warm_start_imports_no_compiler(device: torch.device, cache: Path) -> None:
    assert set(run(cache=cache)["origins"]) == {"compiled"}
    warm = run(cache=cache)
    assert set(warm["origins"]) == {"disk"}
    assert not warm["compilers"]


@pytest.mark.parametrize("tool", ["memcheck", "initcheck"])
def test_compute_sanitizer(tool: str, device: torch.device, cache: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    run(cache=cache)  # compiles, which would take minutes under the tool
    # every tensor is an allocation of its own: the tool knows nothing of what torch's allocator hands out twice
    run(sanitizer, "--tool", tool, "--error-exitcode", "3", cache=cache, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
