"""The first step on a GPU: compiled in one process, loaded in the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# A GPU whose kernels are compiled as for a real one, and launched by a driver that only counts.
_SCRIPT = """
import ctypes, json, os, sys, time
from dataclasses import replace
from pathlib import Path
import torch, stand_in
import compiled_optim
from compiled_optim._engine.kernels import backends
from compiled_optim._engine.kernels.backends import cuda, cuda_launch

stand_in.register()
driver = stand_in.build(Path(sys.argv[1]), ["-std=c++20", "-O1"], lambda path: ctypes.CDLL(str(path)))
os.environ["COMPILED_OPTIM_CACHE_DIR"] = sys.argv[2]

class Gpu(cuda.Cuda):
    device_type = stand_in.TYPE
    open_driver = lambda self: cuda_launch.driver(driver._name)
    index_of = lambda self, device: device.index
    stream = lambda self, device: 0
    is_capturing = lambda self, device: False

    def programs(self, *args):  # the driver looks for names only
        return [replace(p, cubin=p.name.encode()) for p in super().programs(*args)]

backends.BACKENDS = (*backends.BACKENDS, Gpu(90))
p = torch.nn.Parameter(torch.ones(5, device=stand_in.DEVICES[0]))
p.grad = torch.ones_like(p)
optimizer = compiled_optim.AdamW([p], compiled=True, capturable=True)
started = time.perf_counter()
optimizer.step()
seconds = time.perf_counter() - started
(row,) = compiled_optim.explain(optimizer)
heavy = [m for m in sys.modules if m.split(".")[0] in ("triton", "sympy") or m.startswith("torch._inductor")][:3]
launches = ctypes.c_int64.in_dll(driver, "stand_in_launches").value
print(json.dumps(dict(origin=row.origin, launches=row.launches, launched=launches, heavy=heavy, seconds=seconds)))
"""


def first_step(cache: Path) -> dict[str, Any]:
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "COMPILED_OPTIM_STRICT": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    command = [sys.executable, "-c", _SCRIPT, str(HERE / "stand_in_driver.cpp"), str(cache / "kernels")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_warm_start_imports_neither_inductor_nor_triton(tmp_path: Path) -> None:
    cold, warm = first_step(tmp_path), first_step(tmp_path)
    assert (cold["origin"], warm["origin"]) == ("compiled", "disk")
    assert cold["heavy"]
    assert warm["heavy"] == []
    assert cold["launches"] == warm["launches"] == 2  # the prologue, and the update
    assert cold["launched"] == warm["launched"]
