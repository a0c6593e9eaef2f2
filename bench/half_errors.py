"""What storage in bfloat16 costs in accuracy: errors of steps against a float64 run, ours beside torch's.

    python bench/half_errors.py [STEPS]

All runs are given the same gradients, which bfloat16 holds, from the same parameters. An error is a root mean square:
of parameters as a part of how far the float64 run moved them, of moments as a part of what they are there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from compiled_optim import AdamW

ELEMENTS, STEPS = 20_000, 1000
OPTIONS = {"lr": 1e-3, "weight_decay": 1e-2}
BF16, FP32 = torch.bfloat16, torch.float32
MOMENTS = ("exp_avg", "exp_avg_sq")
Build = Callable[[list[Any]], torch.optim.Optimizer]


def ours(**around: Any) -> Build:
    return lambda params: AdamW(params, compiled=True, **OPTIONS, **around)  # type: ignore[arg-type]


def theirs(**options: Any) -> Build:
    return lambda params: torch.optim.AdamW(params, **OPTIONS, **options)  # type: ignore[arg-type]


# by name, the dtype of parameters and gradients, and the optimizer
RUNS: dict[str, tuple[torch.dtype, Build]] = {
    "torch, all bfloat16 (for-loop)": (BF16, theirs(foreach=False)),
    "torch, all bfloat16 (fused)": (BF16, theirs(fused=True)),
    "ours, all bfloat16": (BF16, ours()),
    "ours, state_dtype=float32": (BF16, ours(state_dtype=FP32)),
    "ours, stochastic_rounding": (BF16, ours(stochastic_rounding=True)),
    "ours, stochastic_rounding, state_dtype=float32": (BF16, ours(stochastic_rounding=True, state_dtype=FP32)),
    "ours, master_weights": (BF16, ours(master_weights=True)),
    "ours, master_weights, state_dtype=bfloat16": (BF16, ours(master_weights=True, state_dtype=BF16)),
    "ours, float32 parameters, state_dtype=bfloat16": (FP32, ours(state_dtype=BF16)),
    "torch, all float32 (fused)": (FP32, theirs(fused=True)),
    "ours, all float32": (FP32, ours()),
}


def gradients(steps: int) -> Iterator[Tensor]:
    """Noise around a direction that turns slowly, of magnitudes that differ by element."""
    generator = torch.Generator().manual_seed(1)
    towards, scale = (torch.randn(ELEMENTS, generator=generator) for _ in range(2))
    for _ in range(steps):
        towards = 0.99 * towards + 0.1 * torch.randn(ELEMENTS, generator=generator)
        yield ((towards + 2 * torch.randn(ELEMENTS, generator=generator)) * (scale - 3).exp()).to(BF16)


def run(start: Tensor, dtype: torch.dtype, build: Build, steps: int) -> dict[str, Tensor]:
    """The parameter, its master if there is one, and the moments, in float64."""
    p = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = build([p])
    for grad in gradients(steps):
        p.grad = grad.to(dtype)
        optimizer.step()
    state = optimizer.state[p]
    return {"parameter": p.detach().double(), **{k: v.double() for k, v in state.items() if k in (*MOMENTS, "master")}}


def rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def main(steps: int) -> None:
    start = (torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0)) * 0.05).to(BF16)
    truth = run(start, torch.float64, theirs(foreach=False), steps)
    moved = rms(truth["parameter"] - start.double())
    print(f"{steps} steps of AdamW, {ELEMENTS} elements; nearest bfloat16 parameters: "
          f"{rms(truth['parameter'].to(BF16).double() - truth['parameter']) / moved:.2e}")  # fmt: skip
    print(f"{'':50}{'parameter':>12}{'master':>12}{'exp_avg':>12}{'exp_avg_sq':>12}")
    for name, (dtype, build) in RUNS.items():
        found = run(start, dtype, build, steps)
        errors = {k: rms(found[k] - truth[k]) / rms(truth[k]) for k in MOMENTS}
        for k in ("parameter", "master"):
            if k in found:
                errors[k] = rms(found[k] - truth["parameter"]) / moved
        cells = (errors.get(k) for k in ("parameter", "master", *MOMENTS))
        print(f"{name:50}" + "".join(f"{'-':>12}" if e is None else f"{e:12.2e}" for e in cells))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
