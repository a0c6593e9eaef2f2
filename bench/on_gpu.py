"""Steps on a GPU beside torch's, side by side in one run: ``make bench-gpu``. Needs torch, triton and a C++ compiler.

    python bench/on_gpu.py OUTPUT.json [PART ...]

The parts are the functions in `PARTS`; all run unless some are named. What was measured so far is written after each.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest import mock

import torch
import triton
from bench_first_step import first_steps
from rivals import ALGORITHMS, Shared, Step
from shapes import SMALL, Shapes, gpt2_small, resnet50

import compiled_optim
from compiled_optim import AdamW
from compiled_optim._engine.kernels.backends import cuda

DEVICE = "cuda"
MODELS: dict[str, Shapes] = {
    "100 small tensors": SMALL,
    "ResNet-50": resnet50(),
    "GPT-2 small": gpt2_small(),
    "10,000 tensors of 64": [(64,)] * 10_000,
    "one tensor of 2^28": [(1 << 28,)],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCKS = [(2, 16), (4, 16), (8, 16), (4, 32), (8, 32), (4, 64)]  # warps, and bytes of the narrowest tensor per thread
Result = dict[str, Any]


# ---- time


def on_device(steps: dict[str, Step], rounds: int = 20) -> dict[str, float]:
    """The median microseconds for which a step of each rival keeps the device busy, in rotation.

    The device spins first, so that the host is some steps ahead of it when the measurement begins. What is small stays
    in the device's caches, as it does in training only if nothing else runs between two steps.
    """
    seconds = {name: us * 1e-6 for name, us in on_host(steps, rounds=5).items()}
    per_second = _cycles_per_second()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            repeats = max(1, min(10, int(2e-3 / seconds[name])))
            torch.cuda._sleep(int((1e-4 + 1.5 * seconds[name] * repeats) * per_second))
            times[name].append(_milliseconds(step, repeats) * 1e3 / repeats)
    return {name: median(samples) for name, samples in times.items()}


def _milliseconds(step: Step, repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _cycles_per_second() -> float:
    cycles = 10_000_000
    return cycles / (1e-3 * min(_milliseconds(lambda: torch.cuda._sleep(cycles), 1) for _ in range(3)))


def on_host(steps: dict[str, Step], rounds: int = 50) -> dict[str, float]:
    """The median microseconds until a step of each rival returns, in rotation, on an idle device."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(3 + rounds):
        for name, step in steps.items():
            torch.cuda.synchronize()
            begun = perf_counter()
            step()
            if i >= 3:
                times[name].append((perf_counter() - begun) * 1e6)
    torch.cuda.synchronize()
    return {name: median(samples) for name, samples in times.items()}


def kernels_of(step: Step, repeats: int = 20) -> dict[str, tuple[float, float]]:
    """Of each kernel and copy, by name: how many a step launches, and the microseconds of all of them."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.self_device_time_total]
    return {e.key[:60]: (e.count / repeats, e.self_device_time_total / repeats) for e in events}


# ---- what is timed


def memory_of(shapes: Shapes, dtype: torch.dtype = torch.float32) -> Shared:
    with torch.device(DEVICE):
        return Shared(shapes, dtype)


def each_model(*names: str) -> Iterator[tuple[Result, Shared]]:
    for model in names or MODELS:
        for dtype in DTYPES:
            yield {"model": model, "dtype": dtype}, memory_of(MODELS[model], DTYPES[dtype])
            gc.collect()
            torch.cuda.empty_cache()


def bytes_of(optimizer: Any) -> int:
    return sum(row.elements * row.bytes_per_element for row in compiled_optim.explain(optimizer))


def copy() -> float:
    """GB/s, read and write counted, of a copy far above the caches."""
    source = torch.ones(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    return 2e-3 * source.nbytes / on_device({"copy": lambda: target.copy_(source)})["copy"]


def steps() -> list[Result]:
    """AdamW beside torch's. ``fused=True`` of ours reads step counts and hyperparameters on the device."""
    results = []
    for result, memory in each_model():
        mine, fused = (memory.adopt(AdamW(memory.params, **how)) for how in ({"compiled": True}, {"fused": True}))
        rivals = {
            "torch foreach": memory.adopt(torch.optim.AdamW(memory.params, foreach=True)).step,
            "torch fused": memory.adopt(torch.optim.AdamW(memory.params, fused=True)).step,
            "ours": mine.step,
            "ours, fused=True": fused.step,
        }
        result |= {"device": on_device(rivals), "host": on_host(rivals), "bytes": bytes_of(mine)}
        results.append(result | {"kernels": {**kernels_of(mine.step), **kernels_of(fused.step)}})
    return results


def one_pass() -> list[Result]:
    """AdamW that clips and averages, beside separate passes; in bfloat16 with float32 masters.

    With ``fused=True`` it also skips steps that are not finite. No gradient is so large that it is clipped.
    """
    results, most, decay = [], 1e9, 0.999
    for result, memory in each_model("100 small tensors", "ResNet-50", "GPT-2 small"):
        params, has_masters = memory.params, result["dtype"] != "fp32"
        around = {"max_grad_norm": most, "ema_decay": decay, "master_weights": has_masters}
        mine = AdamW(params, **around, compiled=True)
        fused = AdamW(params, **around, skip_nonfinite=True, fused=True)
        wide = [torch.nn.Parameter(p.detach().float()) for p in params] if has_masters else params
        averages = [p.detach().clone() for p in wide]
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.float()

        @torch.no_grad()
        def separate(
            step: Step, params: Any = params, wide: Any = wide, averages: Any = averages, copies: bool = has_masters
        ) -> None:
            if copies:
                torch._foreach_copy_([q.grad for q in wide], [p.grad for p in params])
            torch.nn.utils.clip_grad_norm_(wide, most, foreach=True)
            step()
            torch._foreach_lerp_(averages, wide, 1 - decay)
            if copies:
                torch._foreach_copy_(params, wide)

        rivals = {
            "torch fused, separate passes": partial(separate, torch.optim.AdamW(wide, fused=True).step),
            "ours, separate passes": partial(separate, AdamW(wide, compiled=True).step),
            "ours": mine.step,
            "ours, fused=True": fused.step,
        }
        for step in rivals.values():
            step()
        moved = bytes_of(mine) + sum(p.grad.nbytes for p in params)  # which the norm reads
        results.append(result | {"device": on_device(rivals), "host": on_host(rivals), "bytes": moved})
    return results


def blocks() -> list[Result]:
    """Launches of other blocks of threads than those that the library chooses."""
    results = []
    for result, memory in each_model():
        rivals, size = {}, 0
        for warps, width in BLOCKS:
            # the key of a kernel does not say which of these it was built with
            with (
                mock.patch.multiple(cuda, _WARPS=warps, _BYTES_PER_THREAD=width),
                mock.patch.dict(os.environ, COMPILED_OPTIM_DISK_CACHE="0"),
            ):
                compiled_optim.cache_clear()
                mine = memory.adopt(AdamW(memory.params, compiled=True))
            rivals[f"{warps} warps, {width} bytes"], size = mine.step, bytes_of(mine)
        compiled_optim.cache_clear()
        results.append(result | {"device": on_device(rivals), "bytes": size})
    return results


def algorithms() -> list[Result]:
    results = []
    for name in ALGORITHMS:
        algorithm, stock = getattr(compiled_optim, name), getattr(torch.optim, name)
        memory = memory_of(MODELS["ResNet-50"])
        options = {"lr": 1e-3, **({"momentum": 0.9} if name == "SGD" else {})}
        rivals = {"torch foreach": stock(memory.params, **options, foreach=True)}
        if "fused" in algorithm.rule.declaration.options:
            rivals["torch fused"] = stock(memory.params, **options, fused=True)
        rivals["ours"] = algorithm(memory.params, **options, compiled=True)
        device = on_device({k: memory.adopt(v).step for k, v in rivals.items()})
        results.append({"algorithm": name, "device": device, "bytes": bytes_of(rivals["ours"])})
    return results


def words() -> list[Result]:
    """What a step sends when all gradients are new tensors, beside a copy of as many bytes from pinned memory."""
    results = []
    for model in ("100 small tensors", "ResNet-50", "10,000 tensors of 64"):
        memory = memory_of(MODELS[model])
        mine = memory.adopt(AdamW(memory.params, compiled=True))
        given = [p.grad for p in memory.params], [torch.randn_like(p) for p in memory.params]
        turn = 0

        def give(memory: Shared = memory, given: Any = given) -> None:
            nonlocal turn
            turn += 1
            for p, grad in zip(memory.params, given[turn % 2], strict=True):
                p.grad = grad

        def step(mine: Any = mine, give: Any = give) -> None:
            give()
            mine.step()

        sent = [v for name, v in kernels_of(step).items() if name.startswith("write")]
        count = 6 * len(memory.params)  # addresses: of parameter, gradient, two moments, scalars, whether to skip
        source = torch.zeros(count, dtype=torch.int64).pin_memory()
        target = torch.empty(count, dtype=torch.int64, device=DEVICE)

        def pinned(source: Any = source, target: Any = target) -> None:
            target.copy_(source, non_blocking=True)

        host = on_host({"same gradients": mine.step, "new gradients": step, "giving them": give, "pinned copy": pinned})
        result = {"model": model, "words": count, "launches": sum(n for n, _ in sent), "host": host}
        device = {"write": sum(us for _, us in sent), "pinned copy": sum(us for _, us in kernels_of(pinned).values())}
        results.append(result | {"device": device})
    return results


def graphs() -> list[Result]:
    """A step in a CUDA graph."""
    results = []
    for result, memory in each_model("100 small tensors", "ResNet-50"):
        rivals = {
            "torch fused": memory.adopt(torch.optim.AdamW(memory.params, fused=True, capturable=True)),
            "ours": memory.adopt(AdamW(memory.params, compiled=True, capturable=True)),
        }
        replays: dict[str, Step] = {}
        for name, optimizer in rivals.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            replays[name] = graph.replay
        results.append(result | {"device": on_device(replays), "host": on_host(replays)})
    return results


def first_step() -> list[Result]:
    """Seconds in a fresh process, without ``import torch`` and the device's own start."""
    results = []
    for count in (10, 161, 1000):
        with tempfile.TemporaryDirectory() as folder:
            results.append({"tensors": count, "seconds": first_steps(count, Path(folder), DEVICE, repeats=2)})
    return results


PARTS: dict[str, Callable[[], Any]] = {
    part.__name__: part for part in (copy, steps, one_pass, blocks, algorithms, words, graphs, first_step)
}


def machine() -> Result:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__, "driver": driver}
    return {"card": properties.name, "capability": f"{properties.major}.{properties.minor}", **versions}


def measure(output: Path, names: list[str], about: Result) -> bool:
    """Whether all parts could be measured. A part that raises is no reason to lose the others."""
    report: Result = {"machine": about}
    for name in names:
        begun = perf_counter()
        try:
            report[name] = PARTS[name]()
        except Exception as error:
            traceback.print_exc()
            report.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"
        output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name} ({perf_counter() - begun:.0f} s): {json.dumps(report.get(name))}", flush=True)
    return "errors" not in report


def main(output: str, *names: str) -> int:
    unknown = sorted({*names} - {*PARTS})
    if unknown:
        raise SystemExit(f"a part must be one of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        raise SystemExit(f"nothing to measure: torch {torch.__version__} sees no CUDA device")
    os.environ["COMPILED_OPTIM_STRICT"] = "1"  # a fallback must not be timed as compiled
    with tempfile.TemporaryDirectory() as folder:
        os.environ["COMPILED_OPTIM_CACHE_DIR"] = f"{folder}/cache"
        return 0 if measure(Path(output), list(names or PARTS), machine()) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
