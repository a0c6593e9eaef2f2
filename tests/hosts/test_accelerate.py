"""Accelerate: `prepare` rebuilds the param groups and wraps the optimizer, which steps when gradients are complete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training import MISSING, Way, assert_same, digits, network

pytest.importorskip("accelerate", **MISSING)

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader

from compiled_optim import lr_scheduler

LR = 0.01


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate keeps its settings in the process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Run:
    """``build(params)`` returns an optimizer, and a schedule that is prepared too or None."""

    def __init__(self, build: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(cpu=True, **options)
        net = network(dtype=dtype)
        optimizer, schedule = build(net.parameters())
        self.raw = optimizer
        self.model, self.optimizer, self.data = self.accelerator.prepare(
            net, optimizer, DataLoader(digits(dtype=dtype), batch_size=16)
        )
        self.schedule = self.accelerator.prepare(schedule) if schedule else None

    def train(self, epochs: int = 1) -> int:
        """Returns how many steps Accelerate says were skipped."""
        skipped = 0
        for _ in range(epochs):
            for images, labels in self.data:
                with self.accelerator.accumulate(self.model):
                    with torch.autocast("cpu", torch.float16, enabled=self.accelerator.scaler is not None):
                        loss = cross_entropy(self.model(images), labels)
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
                    self.optimizer.step()
                    skipped += self.optimizer.step_was_skipped
                    if self.schedule:
                        self.schedule.step()
                    self.optimizer.zero_grad()
        return skipped


def adamw(params: Any) -> Any:
    return torch.optim.AdamW(params, lr=LR), None


def with_ours(way: Way) -> Any:
    return lambda params: (way.of("AdamW")(params, lr=LR), None)


@pytest.mark.host("Accelerate", "`prepare`, accumulation, clipping, and `explain` of AcceleratedOptimizer")
def test_training(way: Way) -> None:
    options: Any = {"dtype": torch.float64, "gradient_accumulation_steps": 2}
    ours, stock = Run(with_ours(way), **options), Run(adamw, **options)
    ours.train(2), stock.train(2)
    assert_same(ours.model, stock.model, 1e-12)
    way.check(ours.optimizer)


@pytest.mark.host("Accelerate", "mixed precision bf16")
def test_bfloat16(way: Way) -> None:
    ours, stock = Run(with_ours(way), mixed_precision="bf16"), Run(adamw, mixed_precision="bf16")
    ours.train(2), stock.train(2)
    assert_same(ours.model, stock.model, 1e-5)
    way.check(ours.optimizer)


@pytest.mark.host("Accelerate", "a GradScaler, with skipped steps counted")
def test_scaler(way: Way) -> None:
    skipped = []
    runs = [Run(with_ours(way)), Run(adamw)]
    for run in runs:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)  # overflows at first
        run.accelerator.scaler = scaler
        run.optimizer = type(run.optimizer)(run.raw, scaler=scaler)
        skipped.append(run.train(5))
    assert 0 < skipped[0] == skipped[1] < 30
    assert_same(runs[0].model, runs[1].model, 1e-5)
    way.check(runs[0].optimizer)


@pytest.mark.host("Accelerate", "a prepared schedule of either library")
def test_prepared_schedule(way: Way) -> None:
    def scheduled(build: Any, kind: Any) -> Any:
        def both(params: Any) -> Any:
            optimizer, _ = build(params)
            return optimizer, kind(optimizer, 3, gamma=0.5)

        return both

    stock = Run(scheduled(adamw, StepLR))
    stock.train()
    for kind in (StepLR, lr_scheduler.StepLR):
        ours = Run(scheduled(with_ours(way), kind))
        ours.train()
        assert_same(ours.model, stock.model)
        assert ours.raw.param_groups[0]["lr"] == stock.raw.param_groups[0]["lr"] < LR
        way.check(ours.optimizer)


@pytest.mark.host("Accelerate", "`save_state`, `load_state`: ours, from torch's and by torch's")
def test_checkpoints(way: Way, tmp_path: Path) -> None:
    whole = Run(adamw)
    whole.train(2)
    for saved, resumed in ((with_ours(way), with_ours(way)), (with_ours(way), adamw), (adamw, with_ours(way))):
        first, second = Run(saved), Run(resumed)
        first.train()
        first.accelerator.save_state(str(tmp_path))
        second.accelerator.load_state(str(tmp_path))
        second.train()
        assert_same(second.model, whole.model)
    way.check(second.optimizer)


def attached(way: Way, module: Any) -> Any:
    def build(params: Any) -> Any:
        optimizer, _ = with_ours(way)(params)
        optimizer.attach(module.CosineAnnealingLR(optimizer, 16))
        return optimizer, None

    return build


def by_hand(params: Any) -> Any:
    optimizer, _ = adamw(params)
    return optimizer, CosineAnnealingLR(optimizer, 16)


def compare_resumed(way: Way, directory: Path, module: Any, *, registered: bool) -> None:
    """Two epochs, with a checkpoint between them, beside torch's two with a schedule that is prepared."""
    whole, first, second = Run(by_hand, torch.float64), *(Run(attached(way, module), torch.float64) for _ in range(2))
    if registered:
        for run in (first, second):
            run.accelerator.register_for_checkpointing(run.raw._attached.schedule)
    whole.train(2)
    first.train()
    first.accelerator.save_state(str(directory))
    second.accelerator.load_state(str(directory))
    second.train()
    assert_same(second.model, whole.model, 1e-12)
    way.check(second.optimizer)


@pytest.mark.host("Accelerate", "an attached schedule, which warns that it was not saved and goes on")
def test_attached_schedule(way: Way, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="attached CosineAnnealingLR did not: it goes on from step 8"):
        compare_resumed(way, tmp_path, lr_scheduler, registered=False)


@pytest.mark.parametrize("module", [lr_scheduler, torch.optim.lr_scheduler], ids=["ours", "torch"])
@pytest.mark.host("Accelerate", "an attached schedule of either library, registered for checkpointing")
def test_registered_schedule(way: Way, tmp_path: Path, recwarn: pytest.WarningsRecorder, module: Any) -> None:
    compare_resumed(way, tmp_path, module, registered=True)
    assert not [text for w in recwarn if "attached" in (text := str(w.message))]
