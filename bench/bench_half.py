"""What a step costs by dtypes of parameters and moments, beside torch's fused kernels and what the bytes alone cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rivals import Shared, bandwidth, compare, traffic
from shapes import MEDIUM, SMALL, gpt2_small, resnet50

import compiled_optim

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
# of parameters and gradients, and of moments; the first is what the others are compared with
MIXES = {
    "float32": (FLOAT, FLOAT),
    "bfloat16 moments": (FLOAT, BRAIN),
    "float32 moments": (BRAIN, FLOAT),
    "bfloat16": (BRAIN, BRAIN),
    "float16": (HALF, HALF),
}
OPTIONS: dict[str, dict[str, Any]] = {"AdamW": {}, "SGD": {"momentum": 0.9}}
MODELS = {
    "100 small": (SMALL, 200),
    "20 medium": (MEDIUM, 50),
    "ResNet-50": (resnet50(), 25),
    "GPT-2": (gpt2_small(), 7),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", OPTIONS)
def test_dtypes(name: str, model: str, benchmark: Any) -> None:
    shapes, rounds = MODELS[model]
    options = {"lr": 1e-3, **OPTIONS[name]}
    ours, stock = getattr(compiled_optim, name), getattr(torch.optim, name)
    shared = {dtype: Shared(shapes, dtype) for dtype in (FLOAT, BRAIN, HALF)}
    steps: dict[str, Any] = {}
    for mix, (dtype, moments) in MIXES.items():
        memory = shared[dtype]
        chosen = {"compiled": True, "state_dtype": None if moments == dtype else moments}
        optimizer: Any = memory.adopt(ours(memory.params, **options, **chosen))
        buffers = tuple(k for k, v in optimizer.state[memory.params[0]].items() if v.shape == shapes[0])
        steps[mix] = optimizer.step
        steps[f"{mix}, traffic alone"] = memory.adopt(traffic(ours, buffers)(memory.params, **chosen)).step
        if moments == dtype:
            steps[f"{mix}, torch fused"] = memory.adopt(stock(memory.params, **options, fused=True)).step
    seconds = compare(steps, rounds)
    found = {
        mix: {
            "milliseconds": round(seconds[mix] * 1e3, 4),
            "float32_over": round(seconds["float32"] / seconds[mix], 2),
            **{
                f"{rival.replace(' ', '_')}_over": round(seconds[f"{mix}, {rival}"] / seconds[mix], 2)
                for rival in ("torch fused", "traffic alone")
                if f"{mix}, {rival}" in seconds
            },
        }
        for mix in MIXES
    }
    benchmark.extra_info.update(by_dtypes=found, copy_gigabytes_per_second=round(bandwidth(), 1))
    print(f"\n{name}, {model}, {torch.backends.cpu.get_cpu_capability()}:")
    for mix, row in found.items():
        print(f"  {mix:18} {row}")
    benchmark.pedantic(steps["bfloat16"], rounds=3)
