"""Optimizers that are named in a configuration: hydra's and LightningCLI's."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from training import MISSING, Way, assert_same, digits, network

pytest.importorskip("lightning", **MISSING)  # a sign that frameworks are installed at all

YAML = """
optimizer:
  _target_: {module}.AdamW
  _partial_: true
  lr: 0.01
  betas: [0.8, 0.9]
  weight_decay: 0.1
"""


def train(optimizer: Any, model: Any) -> None:
    for images, labels in DataLoader(digits(dtype=torch.float64), batch_size=16):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()


@pytest.mark.host("hydra", "`instantiate`, whose ListConfig are betas: given, in a param group, and assigned later")
def test_hydra(way: Way) -> None:
    omegaconf = pytest.importorskip("omegaconf", **MISSING)
    hydra = pytest.importorskip("hydra", **MISSING)
    models = []
    for module, extra in (("compiled_optim", way.options()), ("torch.optim", {})):
        config = omegaconf.OmegaConf.create(YAML.format(module=module))
        model = network(dtype=torch.float64)
        groups = [{"params": model[0].parameters(), "betas": config.optimizer.betas}, {"params": model[2].parameters()}]
        optimizer = hydra.utils.instantiate(config.optimizer)(groups, **extra)
        train(optimizer, model)
        optimizer.param_groups[1]["betas"] = omegaconf.ListConfig([0.7, 0.9])
        train(optimizer, model)
        models.append(model)
        if extra:
            way.check(optimizer)
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            loaded = torch.load(saved, weights_only=True)
            assert [group["betas"] for group in loaded["param_groups"]] == [(0.8, 0.9), (0.7, 0.9)]
            assert {type(group["lr"]) for group in loaded["param_groups"]} == {float}
    assert_same(*models, tolerance=1e-12)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("Adafactor", "eps", [None, 1e-4]),
        ("Muon", "ns_coefficients", [3.0, -4.0, 2.0]),
        ("Rprop", "etas", [0.4, 1.3]),
        ("AdamW", "lr", 0.1),
    ],
)
@pytest.mark.host("hydra", "what else is a sequence or a number in YAML, as a plain value in checkpoints")
def test_plain_values(way: Way, name: str, option: str, values: Any) -> None:
    omegaconf = pytest.importorskip("omegaconf", **MISSING)
    given = omegaconf.OmegaConf.create({option: values})[option]
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = way.of(name)([p], **{option: given})
    optimizer.step()
    (group,) = optimizer.state_dict()["param_groups"]
    assert group[option] == (tuple(values) if isinstance(values, list) else values)
    assert type(group[option]) in (tuple, float)
    way.check(optimizer, reduces=True)


@pytest.mark.host("LightningCLI", "an optimizer, and EMA by `integrations.lightning`, from YAML")
def test_command_line(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    L = pytest.importorskip("lightning", **MISSING)
    pytest.importorskip("jsonargparse", **MISSING)
    from lightning.pytorch.cli import LightningCLI

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Digits(L.LightningModule):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.net = network(dtype=torch.float64)

        def training_step(self, batch: Any, index: int) -> Any:
            return cross_entropy(self.net(batch[0]), batch[1])

        def train_dataloader(self) -> Any:
            return DataLoader(digits(dtype=torch.float64), batch_size=16)

    modules = []
    for module, callbacks, extra in (
        ("compiled_optim", "compiled_optim.integrations.lightning", way.options()),
        ("torch.optim", "lightning.pytorch.callbacks", {}),
    ):
        silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        averages = {"class_path": f"{callbacks}.EMAWeightAveraging", "init_args": {"decay": 0.8, **extra}}
        config = {
            "optimizer": {"class_path": f"{module}.AdamW", "init_args": {"lr": 0.01, "betas": [0.8, 0.9], **extra}},
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "callbacks": [averages], **silent},
        }
        path = tmp_path / f"{module}.yaml"
        path.write_text(json.dumps(config))  # which is YAML too
        cli = LightningCLI(Digits, save_config_callback=None, args=["fit", "--config", str(path)])
        modules.append(cli.model)
        optimizer = cli.trainer.optimizers[0]
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
        if extra:
            way.check(optimizer)
            (average,) = [c._average_model for c in cli.trainer.callbacks if hasattr(c, "_average_model")]
            assert average.compiled == extra["compiled"]
    assert_same(*modules, tolerance=1e-12)
