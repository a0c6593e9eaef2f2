"""Writes an archive of tests/golden: what one version pickles and saves, and how training continues from there.

Run ``python tests/golden_files.py tests/golden/<version>.zip`` when the package has changed what it writes, and append
the names of cases when only these are new. Existing archives are never rewritten, because they stand for the files that
users of that version have.

An archive has two members per case, each written by ``torch.save``. ``<case>.saved`` holds state dicts, tensors and
numbers, so that ``weights_only=True`` loads it. ``<case>.pickled`` holds the object itself.
"""

from __future__ import annotations

import functools
import io
import operator
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sympy as sp
import torch
from torch import nn

import compiled_optim
from compiled_optim import lr_scheduler, swa_utils

MORE = 2  # steps taken after saving, whose outcome is stored too
STEPS_OF_SCHEDULES = 5

# ---- optimizers

RICH: dict[str, dict[str, Any]] = {  # options that need all the state an algorithm can have
    "Adadelta": {"weight_decay": 0.1},
    "Adafactor": {"weight_decay": 0.1},
    "Adagrad": {"weight_decay": 0.1, "lr_decay": 0.1},
    "Adam": {"weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"amsgrad": True, "maximize": True},
    "Adamax": {"weight_decay": 0.1},
    "ASGD": {"weight_decay": 0.1, "t0": 2.0},
    "Muon": {"momentum": 0.9},
    "MuonAdamW": {"use_muon": False},
    "NAdam": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "RAdam": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "RMSprop": {"weight_decay": 0.1, "momentum": 0.9, "centered": True},
    "Rprop": {"step_sizes": (1e-3, 0.1)},
    "SGD": {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
    "SparseAdam": {"betas": (0.8, 0.9)},
}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}-eager": (name, {}) for name in RICH},
    **{f"{name}-compiled": (name, {**options, "compiled": True}) for name, options in RICH.items()},
    "AdamW-fused": ("AdamW", {"fused": True}),
    "AdamW-tensor": ("AdamW", {"lr": torch.tensor(0.01, dtype=torch.float64), "compiled": True}),
    "LBFGS-eager": ("LBFGS", {"max_iter": 3, "history_size": 4, "line_search_fn": "strong_wolfe"}),
    "LBFGS-compiled": ("LBFGS", {"lr": 0.1, "max_iter": 3, "history_size": 4, "compiled": True}),
}


def parameters() -> list[Any]:
    shapes = [(2, 2), (3, 1)]
    return [nn.Parameter(torch.arange(float(r * c), dtype=torch.float64).sin().view(r, c)) for r, c in shapes]


def groups(optimizer: str, params: list[Any]) -> list[Any]:
    """Two param groups where the optimizer takes several."""
    return params if optimizer == "LBFGS" else [{"params": [p]} for p in params]


def train(optimizer: Any, steps: int) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def closure() -> Any:
        loss = torch.stack([(torch.cos(3 * p) + p.square()).sum() for p in params]).sum()
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g.to_sparse(1) if type(optimizer).__name__ == "SparseAdam" else g
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def optimizer_case(name: str) -> tuple[Any, Any]:
    cls, options = OPTIMIZERS[name]
    params = parameters()
    optimizer = getattr(compiled_optim, cls)(groups(cls, params), **options)
    train(optimizer, 2)
    saved = {"params": [p.detach().clone() for p in params], "state_dict": optimizer.state_dict()}
    pickled = dumped({"optimizer": optimizer})
    saved = torch.load(io.BytesIO(dumped(saved)))  # a copy, as a state dict shares the tensors of its optimizer
    train(optimizer, MORE)
    return {**saved, "after": [p.detach() for p in params]}, pickled


# ---- schedules

Build = Callable[[Any], Any]
_falling = functools.partial(operator.pow, 0.9)
SCHEDULES: dict[str, Build] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.4, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7, 0.003),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=2, step_size_down=3, mode="triangular2"),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, _falling),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 0.7, 6),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4], 0.3),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, _falling),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.3, 0.2], total_steps=9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 1.5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SWALR": lambda o: lr_scheduler.SWALR(o, 0.05, 6),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 0.7, 4), lr_scheduler.StepLR(o, 2)], milestones=[4]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "StepLR-attached": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "SymbolicLR": lambda o: lr_scheduler.SymbolicLR(o, sp.Symbol("base_lr") / (1 + sp.Symbol("t"))),
}


def scheduled_optimizer() -> Any:
    options = [{"params": [p], "lr": lr} for p, lr in zip(parameters(), (0.1, 0.02), strict=True)]
    return compiled_optim.SGD(options, momentum=0.9)


def follow(scheduler: Any, steps: int) -> list[list[float]]:
    """Learning rates and momenta after each step."""
    seen = []
    for _ in range(steps):
        train(scheduler.optimizer, 1)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler.optimizer._attached is None:
            scheduler.step()
        seen.append([float(g[name]) for g in scheduler.optimizer.param_groups for name in ("lr", "momentum")])
    return seen


def schedule_case(name: str) -> tuple[Any, Any]:
    optimizer = scheduled_optimizer()
    scheduler = SCHEDULES[name](optimizer)
    if name.endswith("attached"):
        optimizer.attach(scheduler)
    follow(scheduler, 3)
    pickled = dumped({"optimizer": optimizer, "scheduler": scheduler})
    saved = dumped({"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict()})
    return {**torch.load(io.BytesIO(saved)), "after": follow(scheduler, STEPS_OF_SCHEDULES)}, pickled


# ---- averages

AVERAGES: dict[str, Callable[..., Any]] = {
    "SWA": swa_utils.AveragedModel,
    "EMA": functools.partial(swa_utils.AveragedModel, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)),
}
AVERAGED = [f"{kind}-{mode}" for kind in AVERAGES for mode in ("eager", "compiled")]


def model_at(step: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(step, step + p.numel()).sin().view(p.shape))
    return model


def new_average(name: str) -> Any:
    kind, mode = name.split("-")
    return AVERAGES[kind](model_at(0), use_buffers=True, compiled=mode == "compiled")


def average(averaged: Any, steps: range) -> None:
    for step in steps:
        averaged.update_parameters(model_at(step))


def average_case(name: str) -> tuple[Any, Any]:
    averaged = new_average(name)
    average(averaged, range(2))
    # what get_ema_multi_avg_fn returns cannot be pickled, neither here nor in torch
    pickled = dumped({"averaged": averaged}) if name.startswith("SWA") else None
    saved = torch.load(io.BytesIO(dumped({"state_dict": averaged.state_dict()})))
    average(averaged, range(2, 2 + MORE))
    return {**saved, "after": averaged.state_dict()}, pickled


# ---- the archive

CASES: list[tuple[str, Callable[[str], tuple[Any, Any]]]] = [
    *((name, optimizer_case) for name in OPTIMIZERS),
    *((name, schedule_case) for name in SCHEDULES),
    *((name, average_case) for name in AVERAGED),
]


def dumped(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def write(path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "x", zipfile.ZIP_DEFLATED) as archive:
        for name, make in CASES:
            if names and name not in names:
                continue
            saved, pickled = make(name)
            for kind, data in (("saved", dumped(saved)), ("pickled", pickled)):
                if data is not None:
                    info = zipfile.ZipInfo(f"{name}.{kind}")  # without a date: the same code writes the same file
                    info.compress_type = zipfile.ZIP_DEFLATED
                    archive.writestr(info, data)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2:])
