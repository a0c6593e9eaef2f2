"""Steps in which nothing but values changed: in one call of the host module, the long way, and torch's.

The long way is what a step with a hook or a profiler takes. Tensors of one element leave the cost of the host alone.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from rivals import Shared, compare
from shapes import LORA, SMALL, TINY

import compiled_optim

MODELS = {"6 small tensors": (TINY, 1000), "100 small tensors": (SMALL, 200), "LoRA, 96 tensors": (LORA, 100)}
OPTIONS: dict[str, dict[str, Any]] = {"AdamW": {}, "SGD": {"momentum": 0.9}, "NAdam": {}}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", OPTIONS)
def test_quick_step(name: str, model: str, benchmark: Any) -> None:
    shapes, rounds = MODELS[model]
    options = {"lr": 1e-3, **OPTIONS[name]}
    memory, single = Shared(shapes), Shared([(1,)] * len(shapes))

    def own(memory: Shared) -> Any:
        return memory.adopt(getattr(compiled_optim, name)(memory.params, compiled=True, **options))

    def stock(**how: Any) -> Any:
        return memory.adopt(getattr(torch.optim, name)(memory.params, **options, **how)).step

    ours, long, host = own(memory), own(memory), own(single)
    steps = {
        "quick": ours.step,
        "the long way": lambda: long._run_step(None),
        "host part": host.step,
        "torch foreach": stock(foreach=True),
    }
    if name != "NAdam":
        steps["torch fused"] = stock(fused=True)
    gc.disable()
    seconds = compare(steps, rounds)
    gc.enable()
    benchmark.extra_info.update(
        microseconds={k: round(v * 1e6, 2) for k, v in seconds.items()},
        over_quick={k: round(v / seconds["quick"], 2) for k, v in seconds.items() if k not in ("quick", "host part")},
        tensors=len(shapes),
        elements=sum(torch.Size(s).numel() for s in shapes),
        instructions=torch.backends.cpu.get_cpu_capability(),
    )
    print(f"\n{name}, {model}: {benchmark.extra_info}")
    benchmark.pedantic(ours.step, rounds=rounds, warmup_rounds=3)
