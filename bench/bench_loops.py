"""Training loops under torch.compile: graphs, recompiles and seconds to the first step, each in a process of its own
with empty caches; and the median iteration, all ways in rotation in one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
import torch._dynamo
from rivals import compare


def first_steps(model: str, way: loops.Way, directory: Path) -> dict[str, Any]:
    environment = {
        **os.environ,
        "COMPILED_OPTIM_CACHE_DIR": str(directory / "ours"),
        "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),
    }
    command = [sys.executable, str(Path(__file__).with_name("loops.py")), model, way.name]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    # what was compiled need not be compiled again to time iterations
    shutil.copytree(directory / "inductor", os.environ["TORCHINDUCTOR_CACHE_DIR"], dirs_exist_ok=True)
    return measured


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("model", loops.MODELS)
def test_loop(model: str, benchmark: Any, tmp_path: Path) -> None:
    measured = {way.name: first_steps(model, way, tmp_path / str(i)) for i, way in enumerate(loops.WAYS) if way.cold}
    steps = {}
    for way in loops.WAYS:
        with torch._dynamo.config.patch(trace_autograd_ops=way.one_graph):
            steps[way.name] = loops.build(model, way)
            steps[way.name]()
    seconds = compare(steps, rounds=300 if model == "MLP" else 100, warmup=5)
    for name, median in seconds.items():
        measured.setdefault(name, {})["milliseconds"] = round(median * 1e3, 4)
    benchmark.extra_info.update(loops=measured)
    print(f"\n{model}: {json.dumps(measured, indent=1)}")
    benchmark.pedantic(steps[loops.WAYS[-1].name], rounds=10, warmup_rounds=2)
