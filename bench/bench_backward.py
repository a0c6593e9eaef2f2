"""An iteration whose steps are taken during the backward pass, against the ordinary loop and torch's recipe.

The recipe is one torch.optim optimizer per parameter, called by `register_post_accumulate_grad_hook`. Gradients are
counted after each accumulation, before a hook uses them; the peak of the process is that of a fresh one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Transformer
from rivals import compare
from torch import Tensor, nn

from compiled_optim import AdamW


def transformer(width: int) -> tuple[nn.Module, Tensor, Tensor]:
    return Transformer(width), torch.randint(100, (4, 32)), torch.randint(100, (128,))


def mlp(width: int, layers: int) -> tuple[nn.Module, Tensor, Tensor]:
    modules = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*modules), torch.randn(64, width), torch.randint(width, (64,))


MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "transformer, 0.5M": (lambda: transformer(64), 30),
    "MLP, 25M": (lambda: mlp(1024, 24), 12),
    "transformer, 25M": (lambda: transformer(512), 12),
}
BLOCKS = {f"ours in backward, blocks of {n}": n for n in (1, 1 << 16, 1 << 20, 1 << 22)}
WAYS = ["torch", "torch in backward", "ours", *BLOCKS]
Iteration = Callable[[], None]


def build(model_name: str, way: str) -> tuple[nn.Module, Iteration]:
    torch.manual_seed(0)
    model, x, y = MODELS[model_name][0]()

    def backward() -> None:
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y))

    if way == "torch in backward":
        recipe(model)
        return model, backward
    optimizer: Any
    if way == "torch":
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    else:
        optimizer = AdamW(model.parameters(), compiled=True)
    if way in BLOCKS:
        optimizer.step_in_backward(model, block_elements=BLOCKS[way])

    def loop() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, loop


def recipe(model: nn.Module) -> None:
    optimizers = {p: torch.optim.AdamW([p], fused=True) for p in model.parameters()}

    def hook(p: Any) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(hook)


def gradient_bytes(model_name: str, way: str) -> int:
    """The most that gradients take at a time in an iteration."""
    found, params = [0], []
    original = Tensor.register_post_accumulate_grad_hook

    def count(p: Any, hook: Any) -> Any:  # so that it is called before the hook of the optimizer
        original(p, lambda _: found.append(sum(q.grad.nbytes for q in params if q.grad is not None)))
        return original(p, hook)

    Tensor.register_post_accumulate_grad_hook = count  # type: ignore[method-assign]
    try:
        model, iteration = build(model_name, way)
        if way in ("torch", "ours"):
            for p in model.parameters():
                count(p, lambda _: None)
    finally:
        Tensor.register_post_accumulate_grad_hook = original  # type: ignore[method-assign]
    params += model.parameters()
    for _ in range(2):
        found.clear()
        iteration()
    return max(found)


def peak_of_process(model_name: str, way: str) -> float:
    """MiB of a fresh process."""
    command = [sys.executable, __file__, model_name, way]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return float(ran.stdout)


@pytest.mark.parametrize("model", MODELS)
def test_backward(model: str, benchmark: Any) -> None:
    iterations = {way: build(model, way)[1] for way in WAYS}
    seconds = compare(iterations, MODELS[model][1])
    del iterations
    benchmark.extra_info.update(
        backward_milliseconds={way: round(s * 1e3, 3) for way, s in seconds.items()},
        over_ours={way: round(s / seconds["ours"], 3) for way, s in seconds.items()},
        gradient_mebibytes={way: round(gradient_bytes(model, way) / 2**20, 2) for way in WAYS},
        process_mebibytes={way: round(peak_of_process(model, way)) for way in WAYS},
    )
    print(f"\n{model}: {json.dumps(benchmark.extra_info, indent=1)}")
    benchmark.pedantic(build(model, "ours")[1], rounds=3, warmup_rounds=1)


def main(model_name: str, way: str) -> None:
    _, iteration = build(model_name, way)
    for _ in range(3):
        iteration()
    # of this program only; `resource` has that of the process it was forked from
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(int(kibibytes) / 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
