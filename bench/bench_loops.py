"""Training loops under torch.compile: graphs, recompiles and seconds to the first step, each in a process of its own
with empty caches, and once more where the model's own graphs are cached already, so that the optimizer is what is new;
and the median iteration, all ways in rotation in one process."""

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
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("model", loops.MODELS)
def test_loop(model: str, benchmark: Any, tmp_path: Path) -> None:
    measured: dict[str, Any] = {}
    for i, way in enumerate(loops.WAYS):
        if not way.cold:
            continue
        directory = tmp_path / str(i)
        measured[way.name] = first_steps(model, way, directory)
        # what was compiled need not be compiled again to time iterations
        shutil.copytree(directory / "inductor", os.environ["TORCHINDUCTOR_CACHE_DIR"], dirs_exist_ok=True)
        if not way.one_graph:  # of which the model's graphs are no part
            cached = tmp_path / f"cached_{i}"
            shutil.copytree(tmp_path / "0" / "inductor", cached / "inductor")
            measured[way.name]["cached_seconds"] = first_steps(model, way, cached)["seconds"]
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
