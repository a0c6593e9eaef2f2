"""The cost model beside the clock: steps of tensors far above the caches, and launches of the same traffic alone."""

from __future__ import annotations

import gc
from statistics import median
from typing import Any

import pytest
import torch
from rivals import ALGORITHMS, Shared, rotate, traffic

import compiled_optim

SHAPES: list[tuple[int, ...]] = [(4096, 4096)] * 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_predicted_time(name: str, dtype: str, benchmark: Any) -> None:
    """Of a step, at the bandwidth of a plain update in place in the same round: it drifts where a machine is shared."""
    memory = Shared(SHAPES, DTYPES[dtype])
    ours = memory.adopt(getattr(compiled_optim, name)(memory.params, lr=1e-3, compiled=True))
    buffers = ours.rule.declaration.kept(ours._work().read()[0].switches, torch.float32)
    alone = memory.adopt(traffic(type(ours), buffers)(memory.params, compiled=True))
    updated = torch.zeros(100_000_000)
    steps = {"in place": lambda: updated.add_(1.0), "traffic alone": alone.step, "step": ours.step}
    times = rotate(steps, rounds=15)
    in_place = times.pop("in place")
    (row,) = compiled_optim.explain(ours, bandwidth=2 * updated.nbytes / median(in_place) / 1e9)
    predicted = [row.bytes / (2 * updated.nbytes) * seconds for seconds in in_place]
    milliseconds = {"predicted": row.milliseconds, **{k: median(v) * 1e3 for k, v in times.items()}}
    ratios = {k: median(a / b for a, b in zip(predicted, v, strict=True)) for k, v in times.items()}
    benchmark.extra_info.update(
        cost_milliseconds={k: round(v, 3) for k, v in milliseconds.items()},
        predicted_over={k: round(v, 2) for k, v in ratios.items()},
        bytes_per_element=row.bytes_per_element,
        operations_per_element=round(row.operations / row.elements),
    )
    print(f"\n{name}, {dtype}: {benchmark.extra_info}")
    benchmark.pedantic(ours.step, rounds=5)
    del ours, alone, memory, steps
    gc.collect()
