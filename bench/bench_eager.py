"""One eager step, where only the import is changed: ours against torch's for-loop and foreach, side by side."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from rivals import ALGORITHMS, Shared, compare
from shapes import SMALL, resnet50

import compiled_optim

OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}}
MODELS = {"100 small tensors": (SMALL, 200), "ResNet-50": (resnet50(), 25)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_eager(name: str, model: str, benchmark: Any) -> None:
    options = {"lr": 1e-3, **OPTIONS.get(name, {})}
    shapes, rounds = MODELS[model]
    memory = Shared(shapes)
    stock, own = getattr(torch.optim, name), getattr(compiled_optim, name)
    steps = {
        "torch for-loop": memory.adopt(stock(memory.params, **options, foreach=False)).step,
        "torch foreach": memory.adopt(stock(memory.params, **options, foreach=True)).step,
        "ours eager": memory.adopt(own(memory.params, **options)).step,
    }
    seconds = compare(steps, rounds)
    best = min(v for k, v in seconds.items() if k.startswith("torch"))
    benchmark.extra_info.update(
        eager_milliseconds={k: round(v * 1e3, 4) for k, v in seconds.items()},
        ratio=round(seconds["ours eager"] / best, 2),
    )
    print(f"\n{name}, {model}: {benchmark.extra_info}")
    benchmark.pedantic(steps["ours eager"], rounds=rounds, warmup_rounds=3)
    del steps
    gc.collect()
