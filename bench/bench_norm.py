"""The norm of all gradients, and setting them to zero: one native pass against torch's, on the same gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rivals import compare, parameters
from shapes import SMALL, gpt2_small, resnet50
from torch.nn.utils import get_total_norm

from compiled_optim._engine.executions.norms import total_norm
from compiled_optim._engine.kernels import gradients

MODELS = {"100 small tensors": (SMALL, 300), "ResNet-50": (resnet50(), 30), "GPT-2 small": (gpt2_small(), 10)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_passes(dtype: str, model: str, benchmark: Any) -> None:
    shapes, rounds = MODELS[model]
    params = parameters(shapes, DTYPES[dtype])

    def grads() -> list[torch.Tensor]:  # as `clip_grad_norm_` asks for them in each step
        return [p.grad for p in params if p.grad is not None]

    def ours(norm_type: float) -> float | torch.Tensor:
        return total_norm(params, norm_type, compiled=True, of_gradients=True)

    norm = ours(2.0)
    assert math.isclose(norm, get_total_norm([g.double() for g in grads()]).item(), rel_tol=1e-6)

    def zero_each() -> None:
        for grad in grads():
            grad.zero_()

    rivals = {
        "norm": {
            "ours": lambda: ours(2.0),
            "torch get_total_norm": lambda: get_total_norm(grads()),
            "torch get_total_norm foreach=False": lambda: get_total_norm(grads(), foreach=False),
        },
        "largest": {
            "ours": lambda: ours(math.inf),
            "torch get_total_norm": lambda: get_total_norm(grads(), math.inf),
        },
        "zero": {
            "ours": lambda: gradients.zero([*params], of_gradients=True),
            "torch zero_": zero_each,
            "torch foreach": lambda: torch._foreach_zero_(grads()),
        },
    }
    size = sum(g.nbytes for g in grads())
    for what, steps in rivals.items():
        seconds = compare(steps, rounds)
        benchmark.extra_info[f"{what}_microseconds"] = {name: round(s * 1e6, 1) for name, s in seconds.items()}
        benchmark.extra_info[f"{what}_over_ours"] = {n: round(s / seconds["ours"], 2) for n, s in seconds.items()}
        benchmark.extra_info[f"{what}_gigabytes_per_second"] = round(size / seconds["ours"] / 1e9, 1)
    print(f"\n{dtype}, {model}: {benchmark.extra_info}")
    benchmark.pedantic(rivals["norm"]["ours"], rounds=3, warmup_rounds=1)
