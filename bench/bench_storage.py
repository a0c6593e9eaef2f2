"""State and parameters in bfloat16: master weights in one launch, bfloat16 moments, rounding at random.

Contestants of one test share parameters, gradients and, where it has the same dtype, state. Milliseconds stand in
``extra_info``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rivals import Shared, bandwidth, compare, traffic
from shapes import SMALL, gpt2_small, resnet50

from compiled_optim import AdamW

MODELS = {"100 small": (SMALL, 300), "ResNet-50": (resnet50(), 15), "GPT-2": (gpt2_small(), 5)}
BF16 = torch.bfloat16
MOMENTS = ("exp_avg", "exp_avg_sq")


def masters(shapes: Any) -> dict[str, Any]:
    """bfloat16 parameters and gradients beside float32 masters and moments."""
    shared = Shared(shapes, BF16)
    params = shared.params
    one = shared.adopt(AdamW(params, compiled=True, master_weights=True))
    floor = shared.adopt(traffic(AdamW, (*MOMENTS, "wide"))(params, compiled=True, state_dtype=torch.float32))
    wide = [torch.nn.Parameter(one.state[p]["master"]) for p in params]
    for w in wide:
        w.grad = torch.zeros_like(w)
    narrow_grads, wide_grads = [p.grad for p in params], [w.grad for w in wide]

    def cast(optimizer: Any) -> Any:
        optimizer.step()
        for p, w in zip(params, wide, strict=True):
            optimizer.state[w].update({name: one.state[p][name] for name in MOMENTS})

        @torch.no_grad()
        def step() -> None:
            torch._foreach_copy_(wide_grads, narrow_grads)
            optimizer.step()
            torch._foreach_copy_(params, wide)

        return step

    fused = torch.optim.AdamW(wide, fused=True)
    return {
        "master weights in one launch": one.step,
        "cast + torch fused + cast": cast(fused),
        "cast + ours + cast": cast(AdamW(wide, compiled=True)),
        "torch fused alone, float32": fused.step,
        "a launch that only moves the bytes": floor.step,
    }


def moments(shapes: Any) -> dict[str, Any]:
    """float32 and bfloat16 parameters by the dtype of their moments."""
    full, half = Shared(shapes), Shared(shapes, BF16)
    narrow = AdamW(full.params, compiled=True, state_dtype=BF16)
    rounded = AdamW(half.params, compiled=True, stochastic_rounding=True)
    return {
        "float32": full.adopt(AdamW(full.params, compiled=True)).step,
        "float32, bfloat16 moments": narrow.step,
        "all bfloat16": half.adopt(AdamW(half.params, compiled=True)).step,
        "all bfloat16, rounded at random": half.adopt(rounded).step,
        "torch fused, float32": full.adopt(torch.optim.AdamW(full.params, fused=True)).step,
        "torch fused, all bfloat16": half.adopt(torch.optim.AdamW(half.params, fused=True)).step,
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rivals_of", [masters, moments], ids=lambda f: f.__name__)
def test_storage(benchmark: Any, rivals_of: Any, model: str) -> None:
    shapes, rounds = MODELS[model]
    rivals = rivals_of(shapes)
    seconds = compare(rivals, rounds)
    first, least = next(iter(seconds.items()))
    benchmark.extra_info["passes_milliseconds"] = {name: round(s * 1e3, 4) for name, s in seconds.items()}
    benchmark.extra_info["copy_gigabytes_per_second"] = round(bandwidth(), 1)
    print(f"\n{model}: {first} {least * 1e3:.3f} ms")
    for name, s in seconds.items():
        print(f"  {s * 1e3:9.3f} ms  {s / least:6.2f}x  {name}")
    benchmark.pedantic(rivals[first], rounds=3, iterations=1)
