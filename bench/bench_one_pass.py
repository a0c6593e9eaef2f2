"""Clip + AdamW + EMA in one launch, against our own separate passes and torch's, with and without a GradScaler.

All contestants share parameters, gradients, moments and averages. Milliseconds stand in ``extra_info``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rivals import Shared, bandwidth, compare, traffic
from shapes import SMALL, gpt2_small, resnet50
from torch.nn.utils import clip_grad_norm_, get_total_norm

from compiled_optim import AdamW
from compiled_optim.swa_utils import AveragedModel, get_ema_avg_fn

MODELS = {"100 small": (SMALL, 300), "ResNet-50": (resnet50(), 15), "GPT-2": (gpt2_small(), 5)}
DECAY = 0.999
FAR = 1e9  # no gradient is shrunk, so that all rivals go on from the same values


def rivals_of(shapes: Any) -> dict[str, Any]:
    shared = Shared(shapes)
    params = shared.params
    grads = [p.grad for p in params]
    one = shared.adopt(AdamW(params, compiled=True, max_grad_norm=FAR, skip_nonfinite=True, ema_decay=DECAY))
    ema = [one.state[p]["ema"] for p in params]
    ours = shared.adopt(AdamW(params, compiled=True))
    stock = {kind: shared.adopt(torch.optim.AdamW(params, **{kind: True})) for kind in ("foreach", "fused")}
    model = torch.nn.ParameterList(params)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY), compiled=True)
    for mine, theirs in zip(average.module, ema, strict=True):
        mine.data = theirs
    found, inverse = torch.zeros(()), torch.ones(())

    @torch.no_grad()
    def lerp() -> None:
        torch._foreach_lerp_(ema, params, 1 - DECAY)

    def unscale() -> None:
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inverse)

    def passes(*functions: Any) -> Any:
        def step() -> None:
            for function in functions:
                function()

        return step

    def clip() -> Any:
        return clip_grad_norm_(params, FAR)

    floor = shared.adopt(traffic(AdamW, ("exp_avg", "exp_avg_sq", "ema"))(params, compiled=True))
    for _ in range(3):
        average.update_parameters(model)
    return {
        "one pass": one.step,
        "ours, separate: clip_grad_norm_ + step + AveragedModel": passes(
            clip, ours.step, lambda: average.update_parameters(model)
        ),
        "torch foreach: clip + step + lerp": passes(clip, stock["foreach"].step, lerp),
        "torch fused: clip + step + lerp": passes(clip, stock["fused"].step, lerp),
        "torch fused with AMP: unscale + clip + step + lerp": passes(unscale, clip, stock["fused"].step, lerp),
        "our step alone": ours.step,
        "get_total_norm": lambda: get_total_norm(grads),
        "a launch that only moves the bytes": floor.step,
    }


@pytest.mark.parametrize("model", MODELS)
def test_one_pass(benchmark: Any, model: str) -> None:
    shapes, rounds = MODELS[model]
    rivals = rivals_of(shapes)
    seconds = compare(rivals, rounds)
    least = seconds["one pass"]
    benchmark.extra_info["passes_milliseconds"] = {name: round(s * 1e3, 4) for name, s in seconds.items()}
    benchmark.extra_info["copy_gigabytes_per_second"] = round(bandwidth(), 1)
    print(f"\n{model}: one pass {least * 1e3:.3f} ms")
    for name, s in seconds.items():
        print(f"  {s * 1e3:9.3f} ms  {s / least:6.2f}x  {name}")
    benchmark.pedantic(rivals["one pass"], rounds=3, iterations=1)
