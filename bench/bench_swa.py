"""One update of an averaged model: ours, torch.optim.swa_utils, and the one operation that it is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rivals import compare
from shapes import SMALL, TINY, resnet50
from torch.optim import swa_utils as stock

from compiled_optim import swa_utils

MODELS = {
    "6 small tensors": (TINY, 1000),
    "20 small tensors": (SMALL[:20], 500),
    "100 small tensors": (SMALL, 200),
    "ResNet-50": (resnet50(), 30),
}
AVERAGES: dict[str, Any] = {
    "equal": lambda utils: {},
    "EMA": lambda utils: {"multi_avg_fn": utils.get_ema_multi_avg_fn(0.999)},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("average", AVERAGES)
def test_average(average: str, model: str, benchmark: Any) -> None:
    shapes, rounds = MODELS[model]
    source = torch.nn.ParameterList([torch.randn(shape) for shape in shapes])
    theirs = stock.AveragedModel(source, **AVERAGES[average](stock))
    ours = swa_utils.AveragedModel(source, **AVERAGES[average](swa_utils), compiled=True)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.data = q.data  # the same memory for both, as in rivals.Shared
    averaged, models = ([p.detach() for p in m.parameters()] for m in (ours, source))
    steps = {name: lambda a=a: a.update_parameters(source) for name, a in (("torch", theirs), ("ours", ours))}
    steps["lerp"] = lambda: torch._foreach_lerp_(averaged, models, 0.001)
    seconds = compare(steps, rounds)
    benchmark.extra_info.update(
        average_microseconds={k: round(v * 1e6, 2) for k, v in seconds.items()},
        ratio=round(seconds["torch"] / seconds["ours"], 2),
        lerp_over=round(seconds["lerp"] / seconds["ours"], 2),
        gigabytes_per_second=round(12 * sum(torch.Size(s).numel() for s in shapes) / seconds["ours"] / 1e9, 1),
    )
    print(f"\n{average}, {model}: {benchmark.extra_info}")
    benchmark.pedantic(steps["ours"], rounds=rounds, warmup_rounds=3)
