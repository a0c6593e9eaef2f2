"""One optimizer step, everything included: ours against torch's foreach, fused and compiled ones, side by side."""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest
import torch
from rivals import Traffic, TrafficSGD, bandwidth, compare, parameters
from shapes import SMALL, gpt2_small, resnet50

import compiled_optim

ALGORITHMS: dict[str, tuple[str, dict[str, Any], type[compiled_optim.Optimizer]]] = {
    "AdamW": ("AdamW", {"lr": 1e-3}, Traffic),
    "SGD+momentum": ("SGD", {"lr": 1e-3, "momentum": 0.9}, TrafficSGD),
}
MODELS = {"100 small tensors": (SMALL, 300), "ResNet-50": (resnet50(), 30), "GPT-2 small": (gpt2_small(), 10)}


@pytest.fixture(scope="module", autouse=True)
def machine() -> float:
    speed = bandwidth()
    print(f"\n{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, copy {speed:.1f} GB/s")
    return speed


def stock(name: str, options: dict[str, Any], shapes: Any, **how: Any) -> Callable[[], Any]:
    return getattr(torch.optim, name)(parameters(shapes), **options, **how).step


def torch_compiled(name: str, options: dict[str, Any], shapes: Any) -> tuple[Callable[[], Any], float]:
    """``torch.compile(optimizer.step)`` and the seconds its first calls take (SGD compiles again at its second)."""
    torch._dynamo.reset()
    optimizer = getattr(torch.optim, name)(parameters(shapes), **options)
    step = torch.compile(lambda: optimizer.step())
    begun = perf_counter()
    step()
    step()
    return step, perf_counter() - begun


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_step(algorithm: str, model: str, benchmark: Any, machine: float) -> None:
    name, options, traffic = ALGORITHMS[algorithm]
    shapes, rounds = MODELS[model]
    elements = sum(torch.Size(s).numel() for s in shapes)
    ours = getattr(compiled_optim, name)(parameters(shapes), **options, compiled=True)
    compiled, compile_seconds = torch_compiled(name, options, shapes)
    steps = {
        "torch for-loop": stock(name, options, shapes, foreach=False),
        "torch foreach": stock(name, options, shapes, foreach=True),
        "torch fused": stock(name, options, shapes, fused=True),
        "torch.compile(step)": compiled,
        "ours eager": getattr(compiled_optim, name)(parameters(shapes), **options).step,
        "ours compiled": ours.step,
        "traffic alone": traffic(parameters(shapes), compiled=True).step,
    }
    seconds = compare(steps, rounds)
    (row,) = compiled_optim.explain(ours)
    best = min(v for k, v in seconds.items() if k.startswith("torch"))
    moved = elements * row.bytes_per_element / seconds["ours compiled"] / 1e9
    benchmark.extra_info.update(
        milliseconds={k: round(v * 1e3, 4) for k, v in seconds.items()},
        torch_compile_seconds=round(compile_seconds, 1),
        fused_over_ours=round(seconds["torch fused"] / seconds["ours compiled"], 2),
        best_torch_over_ours=round(best / seconds["ours compiled"], 2),
        traffic_over_ours=round(seconds["traffic alone"] / seconds["ours compiled"], 2),
        gigabytes_per_second=round(moved, 1),
        copy_gigabytes_per_second=round(machine, 1),
        elements=elements,
        tensors=len(shapes),
    )
    print(f"\n{algorithm}, {model}: {benchmark.extra_info}")
    benchmark.pedantic(ours.step, rounds=rounds, warmup_rounds=3)
    del steps, ours, compiled
    gc.collect()


@pytest.mark.parametrize("count", [161, 10_000])
def test_host_cost(count: int, benchmark: Any) -> None:
    """Microseconds per tensor of a step of tensors with one element each: nearly all of it is the host's work."""
    shapes: Any = [(1,)] * count
    ours = compiled_optim.AdamW(parameters(shapes), compiled=True)
    steps = {
        "torch for-loop": stock("AdamW", {}, shapes, foreach=False),
        "torch foreach": stock("AdamW", {}, shapes, foreach=True),
        "torch fused": stock("AdamW", {}, shapes, fused=True),
        "ours compiled": ours.step,
    }
    seconds = compare(steps, rounds=200 if count < 1000 else 20)
    benchmark.extra_info.update(microseconds_per_tensor={k: round(v / count * 1e6, 3) for k, v in seconds.items()})
    print(f"\n{count} tensors of one element: {benchmark.extra_info}")
    benchmark.pedantic(ours.step, rounds=20, warmup_rounds=3)
