"""Lightning's Trainer: it owns the loop, hands closures to `step`, and wraps the optimizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from training import MISSING, Way, assert_same, digits, network

pytest.importorskip("lightning", **MISSING)

import lightning as L
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader

import compiled_optim
from compiled_optim import lr_scheduler
from compiled_optim.integrations import lightning as ours_for_lightning

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
LR = 0.01
STEPS = 8


class Digits(L.LightningModule):
    """``configure(params)`` returns what configure_optimizers is to."""

    def __init__(self, configure: Any) -> None:
        super().__init__()
        self.net, self.configure = network(), configure
        self.validated: list[float] = []

    def configure_optimizers(self) -> Any:
        return self.configure(self.parameters())

    def loss(self, batch: Any) -> Any:
        images, labels = batch
        return cross_entropy(self.net(images.to(next(self.parameters()).dtype)), labels)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(self.loss(batch).item())


class Manual(Digits):
    """Two optimizers that take turns, for the layers."""

    def __init__(self, configure: Any) -> None:
        super().__init__(configure)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [self.configure(self.net[0].parameters()), self.configure(self.net[2].parameters())]

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()[index % 2]
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()
        self.untoggle_optimizer(optimizer)


def fit(model: Any, *, checkpoint: Any = None, max_epochs: int = 1, validate: bool = False, **options: Any) -> Any:
    """The trainer that has trained ``model``."""
    data = DataLoader(digits(), batch_size=16)
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in options.get("callbacks", ()))
    trainer = L.Trainer(
        max_epochs=max_epochs, accelerator="cpu", devices=1, enable_checkpointing=saves, **silent, **options
    )
    trainer.fit(model, data, *[data] * validate, ckpt_path=checkpoint)
    return trainer


def saving(directory: Path) -> Any:
    """Writes a checkpoint after each epoch: epoch=0.ckpt, epoch=1.ckpt and so on."""
    return ModelCheckpoint(directory, "{epoch}", save_top_k=-1)


def adamw(params: Any) -> Any:
    return torch.optim.AdamW(params, lr=LR)


def with_ours(way: Way) -> Any:
    return lambda params: way.of("AdamW")(params, lr=LR)


def compare(way: Way, kind: Any = Digits, tolerance: float = 1e-6, **options: Any) -> Any:
    """Trains with both; returns our trainer and torch's."""
    models = [kind(with_ours(way)), kind(adamw)]
    trainers = [fit(model, **options) for model in models]
    assert_same(*models, tolerance=tolerance)
    way.check(trainers[0].optimizers[0])
    return trainers


@pytest.mark.host("Lightning", "automatic optimization, and `explain` of `LightningOptimizer`")
def test_automatic(way: Way) -> None:
    ours, _ = compare(way, precision="64-true", tolerance=1e-12)
    way.check(ours.model.optimizers())


@pytest.mark.host("Lightning", "manual optimization, two optimizers, clipping")
def test_manual(way: Way) -> None:
    ours, _ = compare(way, Manual, precision="64-true", tolerance=1e-12)
    for optimizer in ours.model.optimizers():
        way.check(optimizer)


@pytest.mark.host("Lightning", "precision 16-mixed with a GradScaler")
def test_mixed(way: Way) -> None:
    scalers = []

    def plugin() -> Any:
        scalers.append(torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3))  # overflows at first
        return MixedPrecision("16-mixed", "cpu", scaler=scalers[-1])

    models = [Digits(with_ours(way)), Digits(adamw)]
    ours, _ = [fit(model, plugins=[plugin()], max_epochs=4) for model in models]
    assert_same(*models, tolerance=1e-5)
    assert 2.0 < scalers[0].get_scale() < 2.0**40
    assert scalers[0].get_scale() == scalers[1].get_scale()
    way.check(ours.optimizers[0])


@pytest.mark.host("Lightning", "precision bf16-mixed")
def test_bfloat16(way: Way) -> None:
    compare(way, precision="bf16-mixed", tolerance=1e-5)


@pytest.mark.host("Lightning", "precision bf16-true")
def test_true_bfloat16(way: Way) -> None:
    compare(way, precision="bf16-true", tolerance=4e-3)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.host("Lightning", "gradient clipping, by norm and by value")
def test_clipping(way: Way, algorithm: str) -> None:
    compare(way, precision="64-true", tolerance=1e-12, gradient_clip_val=0.02, gradient_clip_algorithm=algorithm)


@pytest.mark.host("Lightning", "accumulation of gradients")
def test_accumulation(way: Way) -> None:
    compare(way, precision="64-true", tolerance=1e-12, accumulate_grad_batches=3, max_epochs=4)


@pytest.mark.host("Lightning", "schedules of both libraries, by step")
def test_schedules(way: Way) -> None:
    def scheduled(optimizer: Any, module: Any) -> Any:
        schedule = module.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    build = with_ours(way)
    stock = Digits(lambda params: scheduled(adamw(params), torch.optim.lr_scheduler))
    fit(stock)
    for module in (torch.optim.lr_scheduler, lr_scheduler):
        model = Digits(lambda params, module=module: scheduled(build(params), module))
        trainer = fit(model)
        assert_same(model, stock)
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-15)
        way.check(trainer.optimizers[0])


@pytest.mark.parametrize(("saved", "resumed"), [("ours", "ours"), ("stock", "ours"), ("ours", "stock")])
@pytest.mark.host("Lightning", "resume: ours, from torch's and by torch's")
def test_resume(way: Way, tmp_path: Path, saved: str, resumed: str) -> None:
    build = {"ours": with_ours(way), "stock": adamw}
    whole = Digits(adamw)
    fit(whole, max_epochs=2)
    first = fit(Digits(build[saved]), max_epochs=1, callbacks=[saving(tmp_path)])
    second = Digits(build[resumed])
    trainer = fit(second, checkpoint=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert trainer.global_step == 2 * STEPS
    assert_same(second, whole)
    way.check((trainer if resumed == "ours" else first).optimizers[0])


@pytest.mark.host("Lightning", "resume with an attached schedule, which warns that it was not saved and goes on")
def test_resume_with_an_attached_schedule(way: Way, tmp_path: Path) -> None:
    def attached(params: Any) -> Any:
        optimizer: Any = with_ours(way)(params)
        optimizer.attach(lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS))
        return optimizer

    def by_hand(params: Any) -> Any:
        optimizer = adamw(params)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    whole, second = Digits(by_hand), Digits(attached)
    fit(whole, max_epochs=2)
    fit(Digits(attached), max_epochs=1, callbacks=[saving(tmp_path)])
    with pytest.warns(UserWarning, match=r"attached CosineAnnealingLR did not: it goes on from step 8"):
        trainer = fit(second, checkpoint=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert_same(second, whole)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-15)
    way.check(trainer.optimizers[0])


class Kept(Callback):
    """The averages of a callback as they are after training: the last thing before they replace the model's."""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        (averaging,) = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]
        self.average, self.raw = averaging._average_model, {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.host("Lightning", "EMA by `integrations.lightning.EMAWeightAveraging`, validated and resumed")
def test_averages(way: Way, tmp_path: Path) -> None:
    mine, theirs = ours_for_lightning.EMAWeightAveraging, EMAWeightAveraging
    builds = {mine: with_ours(way), theirs: adamw}

    def run(kind: Any, resumed_from: Any = None) -> Any:
        model, kept = Digits(builds[kind]), Kept()
        average = kind(decay=0.8, update_every_n_steps=2, **(way.options() if kind is mine else {}))
        checkpoint = resumed_from and tmp_path / resumed_from.__module__ / "epoch=0.ckpt"
        callbacks = [kept, average, *[saving(tmp_path / kind.__module__)] * (resumed_from is None)]
        return model, kept, fit(model, callbacks=callbacks, validate=True, checkpoint=checkpoint, max_epochs=2)

    stock, kept_of_torch, _ = run(theirs)
    for resumed_from in (None, mine, theirs):
        model, kept, trainer = run(mine, resumed_from)
        assert isinstance(kept.average, compiled_optim.swa_utils.AveragedModel)
        assert kept.average.compiled == way.options()["compiled"]
        assert_same(kept.average, kept_of_torch.average)
        assert_same(model, stock)  # which is the average now
        assert_same(kept.raw, kept_of_torch.raw)
        torch.testing.assert_close(model.validated[-STEPS:], stock.validated[-STEPS:], rtol=1e-5, atol=1e-6)
        way.check(trainer.optimizers[0])
    assert (kept.raw["net.0.weight"] - model.net[0].weight).abs().max() > 1e-3


@pytest.mark.host("Lightning", "`WeightAveraging` and `StochasticWeightAveraging` of Lightning")
def test_averages_of_lightning(way: Way) -> None:
    for callback in (
        lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.8)),
        lambda: StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1),
    ):
        models = [Digits(with_ours(way)), Digits(adamw)]
        ours, _ = [fit(model, callbacks=[callback()], max_epochs=3) for model in models]
        assert_same(*models, tolerance=1e-5)
        way.check(ours.optimizers[0])


class Matrices(Digits):
    """A second optimizer for what is no matrix. ``configure(name)`` returns the class of an optimizer."""

    def __init__(self, configure: Any) -> None:
        super().__init__(configure)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        matrices, others = ([p for p in self.parameters() if (p.dim() == 2) == is_2d] for is_2d in (True, False))
        return [self.configure("Muon")(matrices, lr=LR), self.configure("AdamW")(others, lr=LR)]

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.host("Lightning", "Muon beside AdamW, in manual optimization")
def test_muon(way: Way) -> None:
    models = [Matrices(way.of), Matrices(lambda name: getattr(torch.optim, name))]
    ours, _ = [fit(model, precision="64-true") for model in models]
    assert_same(*models, tolerance=1e-12)
    way.check(ours.optimizers[0], reduces=True)
    way.check(ours.optimizers[1])


@pytest.mark.host("Lightning", "Adafactor: clipping, resumed, from torch's too")
def test_adafactor(way: Way, tmp_path: Path) -> None:
    def mine(params: Any) -> Any:
        return way.of("Adafactor")(params, lr=LR)

    def theirs(params: Any) -> Any:
        return torch.optim.Adafactor(params, lr=LR)

    straight = [Digits(mine), Digits(theirs)]
    for model in straight:  # in float64, which a checkpoint of Lightning does not keep
        fit(model, gradient_clip_val=0.1, precision="64-true")
    assert_same(*straight, tolerance=1e-12)
    whole = Digits(theirs)
    fit(whole, max_epochs=2)
    for i, first in enumerate((mine, theirs)):
        fit(Digits(first), callbacks=[saving(tmp_path / str(i))])
        resumed = Digits(mine)
        trainer = fit(resumed, checkpoint=tmp_path / str(i) / "epoch=0.ckpt", max_epochs=2)
        assert_same(resumed, whole, 1e-6)
        way.check(trainer.optimizers[0], reduces=True)


@pytest.mark.host("Lightning", "MuonAdamW in automatic optimization, beside torch's Muon and AdamW")
def test_muon_adamw(way: Way) -> None:
    def stock(name: str) -> Any:
        options = {"AdamW": {"betas": (0.9, 0.95)}, "Muon": {"adjust_lr_fn": "match_rms_adamw"}}[name]
        return lambda params, lr: getattr(torch.optim, name)(params, lr=lr, weight_decay=0.1, eps=1e-8, **options)

    model, plain = Digits(lambda params: way.of("MuonAdamW")(params, lr=LR, weight_decay=0.1)), Matrices(stock)
    trainer, _ = (fit(one, precision="64-true") for one in (model, plain))
    assert_same(model, plain, 1e-12)
    way.check(trainer.optimizers[0], reduces=True)
