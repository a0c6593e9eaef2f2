"""AdamW steps of other libraries beside ours, in rotation, on the same parameters, gradients and moments.

    python bench/peers.py OUTPUT.json [MODEL ...]

It runs in an environment of its own (see `make bench-peers`). DeepSpeed compiles its optimizer at the first use, which
takes minutes. A library that cannot be used here is left out, and the reason is printed.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/extensions")  # what DeepSpeed compiles
os.environ["PATH"] = f"{sys.prefix}/bin{os.pathsep}{os.environ.get('PATH', '')}"  # where ninja is

import torch
from rivals import Shared, Step, bandwidth, rotate, traffic
from shapes import SMALL, gpt2_small, resnet50

import compiled_optim

MODELS: dict[str, Any] = {"100 small tensors": SMALL, "ResNet-50": resnet50(), "GPT-2 small": gpt2_small()}
# dtype of the parameters and gradients, and of the moments where an optimizer can choose it
DTYPES = {"fp32": (torch.float32, None), "bf16, moments fp32": (torch.bfloat16, torch.float32)}
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
LIBRARIES = ("torch", "deepspeed", "heavyball", "pytorch_optimizer", "bitsandbytes", "optax", "jax", "numpy")
Rival = Callable[[Shared, Any], Step]  # given memory and the dtype of moments
SECONDS, ROUNDS = 40, 300  # of a comparison, at most
SLOW = 15  # a rival that takes so many times as long as ours has few turns


def ours(memory: Shared, state: Any) -> Step:
    return memory.adopt(compiled_optim.AdamW(memory.params, **OPTIONS, compiled=True, state_dtype=state)).step


def traffic_alone(memory: Shared, state: Any) -> Step:
    floor: Any = traffic(compiled_optim.AdamW, ("exp_avg", "exp_avg_sq"))
    return memory.adopt(floor(memory.params, compiled=True, state_dtype=state)).step


def of_torch(**how: bool) -> Rival:
    return lambda memory, state: memory.adopt(torch.optim.AdamW(memory.params, **OPTIONS, **how)).step


def deepspeed(memory: Shared, state: Any) -> Step:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return memory.adopt(DeepSpeedCPUAdam(memory.params, **OPTIONS, fp32_optimizer_states=state is not None)).step


def heavyball(memory: Shared, state: Any) -> Step:
    """With moments of its own, which it keeps elsewhere."""
    import heavyball

    optimizer = heavyball.AdamW(memory.params, **OPTIONS)
    optimizer.consume_grad = False
    return memory.adopt(optimizer).step


def pytorch_optimizer(memory: Shared, state: Any) -> Step:
    """AdamW that takes shorter steps where the second moment lags behind: the AdamW of this library is torch's."""
    from pytorch_optimizer import StableAdamW

    return memory.adopt(StableAdamW(memory.params, **OPTIONS, kahan_sum=False)).step


def bitsandbytes(memory: Shared, state: Any) -> Step:
    from bitsandbytes.optim import AdamW

    return memory.adopt(AdamW(memory.params, **OPTIONS), {"state1": "exp_avg", "state2": "exp_avg_sq"}).step


def optax(memory: Shared, state: Any) -> Step:
    """Jitted, and given its parameters and moments to overwrite. It has its own: JAX does not write to tensors."""
    import jax
    import optax

    dtype = str(memory.params[0].dtype).removeprefix("torch.")
    (b1, b2), moments = OPTIONS["betas"], None if state is None else "float32"
    rule = optax.adamw(OPTIONS["lr"], b1, b2, OPTIONS["eps"], mu_dtype=moments, weight_decay=OPTIONS["weight_decay"])

    def arrays(tensors: Any) -> list[Any]:
        return [jax.numpy.array(t.detach().float().numpy(), dtype) for t in tensors]

    params, grads = arrays(memory.params), arrays(p.grad for p in memory.params)
    kept = [params, rule.init(params)]

    def update(params: Any, state: Any, grads: Any) -> Any:
        changes, state = rule.update(grads, state, params)
        return optax.apply_updates(params, changes), state

    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        kept[:] = jax.block_until_ready(jitted(*kept, grads))

    return step


RIVALS: dict[str, Rival] = {
    "ours": ours,
    "traffic alone": traffic_alone,
    "torch for-loop": of_torch(foreach=False),
    "torch foreach": of_torch(foreach=True),
    "torch fused": of_torch(fused=True),
    "DeepSpeedCPUAdam": deepspeed,
    "HeavyBall AdamW": heavyball,
    "pytorch_optimizer StableAdamW": pytorch_optimizer,
    "bitsandbytes AdamW": bitsandbytes,
    "optax adamw": optax,
}


def build(memory: Shared, state: Any) -> tuple[dict[str, Step], dict[str, str]]:
    """The rivals that take a step, and why the others do not."""
    steps, left_out = {}, {}
    for name, rival in RIVALS.items():
        try:
            step = rival(memory, state)
            step()
            if any(p.grad is None for p in memory.params):
                raise SystemExit(f"{name} took away the gradients, so the steps of the others would do nothing")
            steps[name] = step
        except Exception as error:  # whatever another library raises
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return steps, left_out


def timed(step: Step) -> float:
    begun = perf_counter()
    step()
    return perf_counter() - begun


def compare(steps: dict[str, Step]) -> dict[str, float]:
    """The median seconds of each; slow ones have a few turns of their own, or they would take all the time."""
    once = {name: min(timed(step) for _ in range(3)) for name, step in steps.items()}
    slow = {name: step for name, step in steps.items() if once[name] > SLOW * once["ours"]}
    quick = {name: step for name, step in steps.items() if name not in slow}
    times, end = rotate(quick, rounds=3), perf_counter() + SECONDS
    while perf_counter() < end and len(times["ours"]) < ROUNDS:
        for name, more in rotate(quick, rounds=3, warmup=0).items():
            times[name] += more
    times.update(rotate(slow, rounds=3, warmup=1))
    return {name: median(times[name]) for name in steps}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    installed = {found.name for found in importlib.metadata.distributions()}
    return {
        "processor": next(iter(names), platform.processor()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "copy, GB/s": round(bandwidth(), 1),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES if name in installed},
    }


def main() -> None:
    results: dict[str, Any] = {"machine": machine(), "steps": []}
    print(json.dumps(results["machine"], indent=1))
    for kind, (dtype, state) in DTYPES.items():
        for model in sys.argv[2:] or MODELS:
            steps, left_out = build(Shared(MODELS[model], dtype), state)
            seconds = compare(steps)
            row = {
                "model": model,
                "dtypes": kind,
                "milliseconds": {name: round(1e3 * s, 4) for name, s in seconds.items()},
                "over_ours": {name: round(s / seconds["ours"], 2) for name, s in seconds.items()},
                "traffic_over": {name: round(seconds["traffic alone"] / s, 2) for name, s in seconds.items()},
                "left_out": left_out,
            }
            results["steps"].append(row)
            print(f"\n{model}, {kind}: milliseconds, ratio to ours, fraction of a launch that only moves the bytes")
            for name in steps:
                cells = [row[column][name] for column in ("milliseconds", "over_ours", "traffic_over")]
                print("  {:>10.3f} {:>8.2f}x {:>7.2f}  {}".format(*cells, name))
            for name, why in left_out.items():
                print(f"  {name} is left out. {why}")
            Path(sys.argv[1]).write_text(json.dumps(results, indent=1))
            del steps
            gc.collect()


if __name__ == "__main__":
    main()
