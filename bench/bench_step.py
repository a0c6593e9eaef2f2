"""One optimizer step, everything included: ours against torch's foreach, fused and compiled ones, side by side."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest
import torch
from rivals import ALGORITHMS, Shared, bandwidth, compare, traffic
from shapes import SMALL, gpt2_small, resnet50

import compiled_optim

OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}}
MODELS = {"100 small tensors": (SMALL, 200), "ResNet-50": (resnet50(), 25), "GPT-2 small": (gpt2_small(), 10)}
CASES = [(a, m) for a in ALGORITHMS for m in MODELS if m != "GPT-2 small" or a in ("AdamW", "SGD")]


@pytest.fixture(scope="module", autouse=True)
def machine() -> float:
    speed = bandwidth()
    print(f"\n{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, copy {speed:.1f} GB/s")
    return speed


def torch_compiled(optimizer: torch.optim.Optimizer) -> tuple[Callable[[], Any], float]:
    """``torch.compile(optimizer.step)``, and the seconds its first calls take."""
    torch._dynamo.reset()
    step = torch.compile(lambda: optimizer.step())
    begun = perf_counter()
    step()
    step()
    return step, perf_counter() - begun


@pytest.mark.parametrize(("name", "model"), CASES)
def test_step(name: str, model: str, benchmark: Any, machine: float) -> None:
    options = {"lr": 1e-3, **OPTIONS.get(name, {})}
    shapes, rounds = MODELS[model]
    elements = sum(torch.Size(s).numel() for s in shapes)
    memory = Shared(shapes)
    algorithm = getattr(torch.optim, name)

    def stock(**how: Any) -> torch.optim.Optimizer:
        return memory.adopt(algorithm(memory.params, **options, **how))

    def own(**how: Any) -> Any:
        return memory.adopt(getattr(compiled_optim, name)(memory.params, **options, **how))

    ours = own(compiled=True)
    buffers = ours.rule.declaration.kept(ours._work().read()[0].switches, torch.float32)
    compiled, compile_seconds = torch_compiled(stock())
    eager = {"torch for-loop": stock(foreach=False).step, "torch foreach": stock(foreach=True).step}
    if "fused" in inspect.signature(algorithm).parameters:
        eager["torch fused"] = stock(fused=True).step
    steps = {
        **eager,
        "torch.compile(step)": compiled,
        "ours eager": own().step,
        "ours compiled": ours.step,
        "traffic alone": memory.adopt(traffic(type(ours), buffers)(memory.params, compiled=True)).step,
    }
    seconds = compare(steps, rounds)
    (row,) = compiled_optim.explain(ours)
    best = min(v for k, v in seconds.items() if k.startswith("torch"))
    best_eager = min(seconds[name] for name in eager)
    moved = elements * row.bytes_per_element / seconds["ours compiled"] / 1e9
    benchmark.extra_info.update(
        milliseconds={k: round(v * 1e3, 4) for k, v in seconds.items()},
        torch_compile_seconds=round(compile_seconds, 1),
        best_eager_over_ours=round(best_eager / seconds["ours compiled"], 2),
        best_torch_over_ours=round(best / seconds["ours compiled"], 2),
        traffic_over_ours=round(seconds["traffic alone"] / seconds["ours compiled"], 2),
        gigabytes_per_second=round(moved, 1),
        copy_gigabytes_per_second=round(machine, 1),
        elements=elements,
        tensors=len(shapes),
    )
    print(f"\n{name}, {model}: {benchmark.extra_info}")
    benchmark.pedantic(ours.step, rounds=rounds, warmup_rounds=3)
    del steps, ours, compiled
    gc.collect()


@pytest.mark.parametrize("count", [161, 10_000])
def test_host_cost(count: int, benchmark: Any) -> None:
    """Microseconds per tensor of a step of tensors with one element each: nearly all of it is the host's work."""
    memory = Shared([(1,)] * count)
    ours = memory.adopt(compiled_optim.AdamW(memory.params, compiled=True))
    steps = {
        "torch for-loop": memory.adopt(torch.optim.AdamW(memory.params, foreach=False)).step,
        "torch foreach": memory.adopt(torch.optim.AdamW(memory.params, foreach=True)).step,
        "torch fused": memory.adopt(torch.optim.AdamW(memory.params, fused=True)).step,
        "ours compiled": ours.step,
    }
    seconds = compare(steps, rounds=200 if count < 1000 else 20)
    benchmark.extra_info.update(microseconds_per_tensor={k: round(v / count * 1e6, 3) for k, v in seconds.items()})
    print(f"\n{count} tensors of one element: {benchmark.extra_info}")
    benchmark.pedantic(ours.step, rounds=20, warmup_rounds=3)
