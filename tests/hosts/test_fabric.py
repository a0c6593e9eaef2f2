"""Lightning's Fabric: the loop is the user's, and the optimizer is wrapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import MISSING, Way, assert_same, digits, network

pytest.importorskip("lightning", **MISSING)

from lightning.fabric import Fabric
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

LR = 0.01


class Run:
    """A training of a few epochs, for ``build(params)``."""

    def __init__(self, build: Any, **options: Any) -> None:
        self.fabric = Fabric(accelerator="cpu", devices=1, **options)
        net = network()
        self.model, self.optimizer = self.fabric.setup(net, build(net.parameters()))
        self.data = self.fabric.setup_dataloaders(DataLoader(digits(), batch_size=16))

    def train(self, epochs: int = 1, clip: float | None = None, accumulate: int = 1) -> None:
        for _ in range(epochs):
            for i, (images, labels) in enumerate(self.data):
                images = images.to(next(self.model.parameters()).dtype)
                with self.fabric.no_backward_sync(self.model, enabled=bool((i + 1) % accumulate)):
                    self.fabric.backward(cross_entropy(self.model(images), labels))
                if (i + 1) % accumulate:
                    continue
                if clip is not None:
                    self.fabric.clip_gradients(self.model, self.optimizer, max_norm=clip)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def save(self, path: Path) -> None:
        self.fabric.save(path, {"model": self.model, "optimizer": self.optimizer})

    def load(self, path: Path) -> None:
        self.fabric.load(path, {"model": self.model, "optimizer": self.optimizer})


def adamw(params: Any) -> Any:
    return torch.optim.AdamW(params, lr=LR)


def with_ours(way: Way) -> Any:
    return lambda params: way.of("AdamW")(params, lr=LR)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.host("Fabric", "clipping, accumulation, precisions 64-true and bf16-mixed, and `explain` of its wrapper")
def test_training(way: Way, precision: Any) -> None:
    ours, stock = Run(with_ours(way), precision=precision), Run(adamw, precision=precision)
    for run in (ours, stock):
        run.train(2, clip=0.1, accumulate=2)
    assert_same(ours.model, stock.model, 1e-12 if precision == "64-true" else 1e-5)
    way.check(ours.optimizer)


@pytest.mark.host("Fabric", "checkpoints: ours, from torch's and by torch's")
def test_checkpoints(way: Way, tmp_path: Path) -> None:
    whole = Run(adamw)
    whole.train(2)
    for saved, resumed in ((with_ours(way), with_ours(way)), (with_ours(way), adamw), (adamw, with_ours(way))):
        first, second = Run(saved), Run(resumed)
        first.train()
        first.save(tmp_path / "saved.ckpt")
        second.load(tmp_path / "saved.ckpt")
        second.train()
        assert_same(second.model, whole.model)
    way.check(second.optimizer)
