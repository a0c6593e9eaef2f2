"""Rules that reduce: Adafactor on ResNet-50 and GPT-2, Muon on the hidden matrices of GPT-2, torch's against ours.

All contestants share parameters, gradients and the state that is shaped like them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rivals import Shared, bandwidth, compare
from shapes import gpt2_small, resnet50

import compiled_optim

HIDDEN = [shape for shape in gpt2_small()[2:] if len(shape) == 2]
CASES: dict[str, tuple[str, Any, int]] = {
    "Adafactor-ResNet-50": ("Adafactor", resnet50(), 15),
    "Adafactor-GPT-2": ("Adafactor", gpt2_small(), 5),
    "Muon-GPT-2, hidden matrices": ("Muon", HIDDEN, 5),
}
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "Adafactor": {"torch for-loop": {"foreach": False}, "torch foreach": {"foreach": True}},
    "Muon": {"torch for-loop": {}},
}


def products(shapes: Any) -> Callable[[], None]:
    """The products of a step of torch's Muon, without anything around them: 5 iterations of 3 for each matrix."""
    pairs = []
    for shape in dict.fromkeys(shapes):
        x = torch.randn(min(shape), max(shape)).bfloat16()
        pairs.append((x, torch.empty_like(x), x.new_empty(len(x), len(x)), shapes.count(shape)))

    def run() -> None:
        for x, y, gram, count in pairs:
            for _ in range(5 * count):
                torch.mm(x, x.T, out=gram)
                torch.mm(gram, gram)
                torch.mm(gram, x, out=y)

    return run


@pytest.mark.parametrize("case", CASES)
def test_rules_that_reduce(benchmark: Any, case: str) -> None:
    name, shapes, rounds = CASES[case]
    shared = Shared(shapes)
    ours, stock = (getattr(module, name) for module in (compiled_optim, torch.optim))
    rivals = {way: shared.adopt(stock(shared.params, **options)).step for way, options in WAYS[name].items()}
    rivals["ours eager"] = shared.adopt(ours(shared.params)).step
    rivals["ours compiled"] = compiled = shared.adopt(ours(shared.params, compiled=True)).step
    if name == "Muon":
        rivals["torch's products alone"] = products(shapes)
    seconds = compare(rivals, rounds, warmup=1)
    best = min(s for way, s in seconds.items() if way in WAYS[name])
    benchmark.extra_info["reducing_milliseconds"] = {way: round(s * 1e3, 3) for way, s in seconds.items()}
    benchmark.extra_info["best_torch_over_ours"] = best / seconds["ours compiled"]
    benchmark.extra_info["copy_gigabytes_per_second"] = round(bandwidth(), 1)
    print(f"\n{case}: {best / seconds['ours compiled']:.2f}x")
    for way, s in seconds.items():
        print(f"  {s * 1e3:10.2f} ms  {way}")
    benchmark.pedantic(compiled, rounds=1, iterations=1)
