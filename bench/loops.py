"""Training loops under torch.compile: the models, and the ways to place the optimizer."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from time import perf_counter
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor, nn

Loop = Callable[[], Tensor]

STEPS = 50
_numbers = itertools.count()


class Transformer(nn.Module):
    """150 tensors, 0.5M elements."""

    def __init__(self, width: int = 64, length: int = 32, words: int = 100) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.layers(self.embedding(tokens) + self.position)
        return self.head(self.norm(hidden)).flatten(0, 1)  # type: ignore[no-any-return]


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    widths = [64, 128, 128, 10]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())][:-1]
    return nn.Sequential(*layers), torch.randn(64, 64), torch.randint(10, (64,))


def conv_net() -> tuple[nn.Module, Tensor, Tensor]:
    widths = [3, 16, 32, 64]
    blocks: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        blocks += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return model, torch.randn(16, 3, 32, 32), torch.randint(10, (16,))


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    return Transformer(), torch.randint(100, (4, 32)), torch.randint(100, (128,))


MODELS = {"MLP": mlp, "conv net": conv_net, "transformer": transformer}


class Way(NamedTuple):
    """Where the optimizer stands. ``one_graph``: with trace_autograd_ops; ``cold``: whether first steps are timed."""

    name: str
    ours: bool
    options: dict[str, Any]
    inside: bool = True
    one_graph: bool = False
    cold: bool = True


WAYS = [
    Way("torch outside", False, {}, inside=False),
    Way("torch fused outside", False, {"fused": True}, inside=False, cold=False),
    Way("torch inside", False, {}),
    Way("ours inside", True, {}),
    Way("ours inside, compiled", True, {"compiled": True}),
    Way("ours inside, one graph", True, {}, one_graph=True, cold=False),
    Way("ours inside, compiled, one graph", True, {"compiled": True}, one_graph=True),
]


def build(model_name: str, way: Way) -> Loop:
    """A scheduled training step. torch's scheduler cannot be traced: it stands outside."""
    import compiled_optim
    from compiled_optim import lr_scheduler

    torch.manual_seed(0)
    model, x, y = MODELS[model_name]()
    # of a float inside the loop, torch.optim makes a graph for each new value
    lr = torch.tensor(1e-3) if way.inside and not way.ours else 1e-3
    module: Any = compiled_optim if way.ours else torch.optim
    optimizer = module.AdamW(model.parameters(), lr=lr, **way.options)
    schedulers: Any = lr_scheduler if way.ours else torch.optim.lr_scheduler
    schedule = schedulers.CosineAnnealingLR(optimizer, T_max=1000)

    def forward_backward() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def train() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if way.ours:
            schedule.step()
        return loss.detach()

    # Dynamo keeps graphs by code object: another rival's would be asked first, in each call
    function = train if way.inside else forward_backward
    code = function.__code__.replace(co_name=f"loop_{next(_numbers)}")
    alone = FunctionType(code, globals(), code.co_name, None, function.__closure__)
    compiled = torch.compile(alone, fullgraph=way.one_graph)

    def loop() -> Tensor:
        loss = compiled().detach()
        if not way.inside:
            optimizer.step()
            optimizer.zero_grad()
        if not way.ours:
            schedule.step()
        return loss

    return loop


def main(model_name: str, way: Way) -> None:
    """Seconds to the first step, and the graphs of 50 more."""
    from torch._dynamo.utils import counters

    torch._dynamo.config.trace_autograd_ops = way.one_graph
    begun = perf_counter()
    loop = build(model_name, way)
    loop()
    seconds = perf_counter() - begun
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(STEPS):
        loop()
    recompiles = counters["stats"]["unique_graphs"] - graphs
    print(json.dumps({"seconds": round(seconds, 2), "graphs": graphs, "recompiles": recompiles}))


if __name__ == "__main__":
    main(sys.argv[1], next(way for way in WAYS if way.name == sys.argv[2]))
