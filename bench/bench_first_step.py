"""Time to the first step in a fresh process, without ``import torch``: cold, warm, and torch's own; and peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

FIRST = """
import json, sys, time, torch
which, count, device = sys.argv[1], int(sys.argv[2]), sys.argv[3]
params = [torch.nn.Parameter(torch.zeros(64, device=device)) for _ in range(count)]
for p in params: p.grad = torch.ones_like(p)
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
wait()
begun = time.perf_counter()
if which == "torch":
    torch.optim.AdamW(params).step()
else:
    import compiled_optim
    optimizer = compiled_optim.AdamW(params, compiled=True)
    optimizer.step()
wait()
print(json.dumps(time.perf_counter() - begun))
"""

PEAK = """
import json, torch, compiled_optim
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
params = [torch.nn.Parameter(torch.ones(1 << 20)) for _ in range(64)]
for p in params: p.grad = torch.ones(1 << 20)
optimizer = compiled_optim.AdamW(params, compiled=True)
optimizer.step()
open("/proc/self/clear_refs", "w").write("5")
before = peak()
for _ in range(3): optimizer.step()
print(json.dumps((peak() - before) * 1024))
"""


def run(code: str, *arguments: str, **environment: str) -> Any:
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def first_steps(count: int, folder: Path, device: str = "cpu", repeats: int = 3) -> dict[str, float]:
    """The median seconds with nothing compiled yet, with a kernel on disk, and of torch.optim."""
    cold, warm, stock = [], [], []
    for i in range(repeats):
        everything_empty = {
            "COMPILED_OPTIM_CACHE_DIR": str(folder / f"{i}"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor{i}"),
        }
        cold.append(run(FIRST, "ours", str(count), device, **everything_empty))
        warm.append(run(FIRST, "ours", str(count), device, **everything_empty))
        stock.append(run(FIRST, "torch", str(count), device))
    return {"cold": median(cold), "warm": median(warm), "torch.optim": median(stock)}


@pytest.mark.parametrize("count", [10, 161, 1000])
def test_first_step(count: int, benchmark: Any, tmp_path: Path) -> None:
    seconds = first_steps(count, tmp_path)
    benchmark.extra_info.update(seconds={k: round(v, 3) for k, v in seconds.items()}, tensors=count)
    print(f"\nfirst step with {count} tensors: {benchmark.extra_info}")
    environment = {"COMPILED_OPTIM_CACHE_DIR": str(tmp_path / "0")}
    benchmark.pedantic(lambda: run(FIRST, "ours", str(count), "cpu", **environment), rounds=1)


def test_peak_memory(benchmark: Any) -> None:
    """Bytes by which three steps raise the peak of a process that holds 1 GB of parameters, gradients and state."""
    extra = run(PEAK)
    benchmark.extra_info.update(extra_bytes=extra)
    print(f"\npeak memory of a step above what it holds: {extra} bytes")
    benchmark.pedantic(lambda: run(PEAK), rounds=1)
