"""What the host does in a step on a GPU, beside a whole step on the CPU of as many tensors, of one element each.

No GPU is needed: the driver is a stand-in, whose launches only copy the words that they are handed. So this says
nothing of how fast a GPU is.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch

from compiled_optim import AdamW
from compiled_optim._engine.kernels import backends

TESTS = Path(__file__).parents[1] / "tests"
PLACEMENTS, ROUNDS = 8, 3  # where 1,000 tensors happen to lie in memory moves a ratio by 5 %


class Stepped:
    """An optimizer with two sets of gradients for its parameters."""

    def __init__(self, tensors: int, device: Any, **options: bool) -> None:
        def made() -> list[torch.Tensor]:
            return [torch.ones(1, device=device) for _ in range(tensors)]

        self.params = [torch.nn.Parameter(t) for t in made()]
        self.gradients = [made(), made()]
        self.optimizer = AdamW(self.params, compiled=True, **options)
        self.median(5, 1)

    def median(self, steps: int, sets: int) -> float:
        """The median seconds of some steps, with one or both sets of gradients in turn."""
        seconds = []
        for i in range(steps):
            if i < 1 or sets > 1:
                for p, grad in zip(self.params, self.gradients[i % sets], strict=True):
                    p.grad = grad
            begun = perf_counter()
            self.optimizer.step()
            seconds.append(perf_counter() - begun)
        return median(seconds[1:])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(sys, "path", [str(TESTS / "cuda"), str(TESTS), *sys.path])
    stand_in_gpu = pytest.importorskip("stand_in_gpu", exc_type=ImportError)
    stand_in = sys.modules["stand_in"]
    stand_in.register()
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, stand_in_gpu.GPU))
    handed_over = ctypes.c_void_p.in_dll(ctypes.CDLL(stand_in_gpu.driver().name), "stand_in_launch")
    before, handed_over.value = handed_over.value, None
    yield stand_in.DEVICES[0]
    handed_over.value = before


@pytest.mark.parametrize("gradients", [1, 2], ids=["same gradients", "new gradients"])
@pytest.mark.parametrize("tensors", [1, 161, 1000])
def test_host_of_a_gpu(tensors: int, gradients: int, device: torch.device, benchmark: Any) -> None:
    kinds: list[tuple[str, Any, dict[str, bool]]] = [
        ("CPU", "cpu", {}),
        ("GPU", device, {}),
        ("GPU, capturable", device, {"capturable": True}),
    ]
    seconds: dict[str, list[float]] = {name: [] for name, *_ in kinds}
    for placement in range(PLACEMENTS):
        turned = kinds[placement % 3 :] + kinds[: placement % 3]  # what is made first has its tensors closer together
        made = {name: Stepped(tensors, where, **options) for name, where, options in turned}
        for _ in range(ROUNDS):
            for name, stepped in made.items():
                seconds[name].append(stepped.median(max(10, 3000 // tensors), gradients))
    ratios = {
        name: round(median(a / b for a, b in zip(values, seconds["CPU"], strict=True)), 3)
        for name, values in seconds.items()
    }
    benchmark.extra_info.update(
        host_microseconds={k: round(median(v) * 1e6, 1) for k, v in seconds.items()}, host_ratios=ratios
    )
    print(f"\n{tensors} tensors: {benchmark.extra_info}")
    benchmark.pedantic(made["GPU"].optimizer.step, rounds=50)
