"""MuonAdamW beside torch.optim.Muon and torch.optim.AdamW on the two parts of a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import compiled_optim
from compiled_optim import MuonAdamW, lr_scheduler

execution = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
HIDDEN = ["first.weight", "second.weight"]


def model() -> nn.Module:
    layers = {"wte": nn.Embedding(5, 4), "first": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "second": nn.Linear(6, 4)}
    return nn.ModuleDict({**layers, "lm_head": nn.Linear(4, 5, bias=False)}).double()


class Pair:
    """torch's two optimizers over a copy of a model."""

    def __init__(self, ours: nn.Module, **options: Any) -> None:
        self.model = copy.deepcopy(ours)
        named = dict(self.model.named_parameters())
        hidden = [named[name] for name in HIDDEN]
        rest = [p for name, p in named.items() if name not in HIDDEN]
        self.optimizers = [
            torch.optim.Muon(hidden, eps=1e-8, adjust_lr_fn="match_rms_adamw", **options),
            torch.optim.AdamW(rest, betas=(0.9, 0.95), **options),
        ]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def give_gradients(*models: nn.Module) -> None:
    for params in zip(*(m.parameters() for m in models), strict=True):
        g = torch.randn_like(params[0])
        for p in params:
            p.grad = g.clone()


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-12)


@execution
def test_it_is_torchs_muon_and_adamw(compiled: bool) -> None:
    ours = model()
    pair = Pair(ours, lr=0.02, weight_decay=0.05)
    optimizer = MuonAdamW(ours.named_parameters(), lr=0.02, weight_decay=0.05, compiled=compiled)
    mine = lr_scheduler.LinearLR(optimizer, 0.2, total_iters=4)
    theirs = [torch.optim.lr_scheduler.LinearLR(o, 0.2, total_iters=4) for o in pair.optimizers]
    for _ in range(4):
        give_gradients(ours, pair.model)
        optimizer.step()
        pair.step()
        for schedule in (mine, *theirs):
            schedule.step()
    assert_equal(ours, pair.model)
    assert {row.execution for row in compiled_optim.explain(optimizer).rows} == {
        "multi_tensor" if compiled else "eager"
    }


@execution
def test_clipping_and_averages_are_those_of_the_whole_model(compiled: bool) -> None:
    ours = model()
    pair = Pair(ours, lr=0.02, weight_decay=0.05)
    average = torch.optim.swa_utils.AveragedModel(pair.model, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.9))
    optimizer = MuonAdamW(
        ours.named_parameters(), lr=0.02, weight_decay=0.05, compiled=compiled, max_grad_norm=0.5, ema_decay=0.9
    )
    for _ in range(3):
        give_gradients(ours, pair.model)
        nn.utils.clip_grad_norm_(pair.model.parameters(), 0.5)
        optimizer.step()
        pair.step()
        average.update_parameters(pair.model)
    # the factor of the gradients is rounded in another place, and a momentum that is rounded to bfloat16 may show it
    torch.testing.assert_close(ours.state_dict(), pair.model.state_dict(), rtol=1e-3, atol=1e-4)
    with optimizer.averaged():
        torch.testing.assert_close(ours.state_dict(), average.module.state_dict(), rtol=1e-3, atol=1e-4)


@execution
def test_training_goes_on_from_a_checkpoint(compiled: bool) -> None:
    ours = model()
    optimizer = MuonAdamW(ours.named_parameters(), lr=0.02, compiled=compiled)
    give_gradients(ours)
    optimizer.step()
    resumed = copy.deepcopy(ours)
    other = MuonAdamW(resumed.named_parameters(), compiled=compiled)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        give_gradients(ours, resumed)
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours.state_dict(), resumed.state_dict(), rtol=0, atol=0)
    assert set(other.state[resumed["first"].weight]) == {"step", "momentum_buffer"}
    assert set(other.state[resumed["first"].bias]) == {"step", "exp_avg", "exp_avg_sq"}


def test_in_a_compiled_loop() -> None:
    ours = model()
    pair = Pair(ours, lr=0.02, weight_decay=0.1)
    optimizer = MuonAdamW(ours.named_parameters(), lr=0.02, compiled=True)

    @torch.compile(backend="eager", fullgraph=True)
    def step() -> None:
        optimizer.step()

    for _ in range(3):
        give_gradients(ours, pair.model)
        step()
        pair.step()
    assert_equal(ours, pair.model)


# ---- which parameters Muon takes


def taken(optimizer: MuonAdamW) -> list[tuple[bool, list[str]]]:
    return [(group["use_muon"], group["param_names"]) for group in optimizer.param_groups]


def test_names_decide_about_embeddings_and_output_layers() -> None:
    names = [
        "wte",
        "wpe",
        "tok_emb",
        "embed_tokens",
        "embeddings.position",
        "lm_head",
        "head",
        "model.score",
        "classifier",
    ]
    hidden = ["attn", "member", "ensemble", "mlp.fc", "multi_head.proj", "headless"]
    params = [(f"{name}.weight", nn.Parameter(torch.randn(2, 3))) for name in [*names, *hidden]]
    optimizer = MuonAdamW(
        [*params, ("attn.bias", nn.Parameter(torch.randn(3))), ("conv", nn.Parameter(torch.randn(2, 2, 2)))]
    )
    muon, adamw = taken(optimizer)
    assert muon == (True, [f"{name}.weight" for name in hidden])
    assert adamw == (False, [*(f"{name}.weight" for name in names), "attn.bias", "conv"])


def test_without_names_muon_takes_all_matrices() -> None:
    ours = model()
    optimizer = MuonAdamW(ours.parameters())
    assert [[p.dim() for p in group["params"]] for group in optimizer.param_groups] == [[2] * 4, [1] * 4]


def test_a_group_says_which() -> None:
    ours = model()
    params = dict(ours.named_parameters())
    groups = [
        {"params": [params["wte.weight"]], "use_muon": True, "lr": 0.5},
        {"params": [params["first.weight"]], "use_muon": False},
        {"params": [params["second.weight"], params["second.bias"]], "lr": 0.25},
        {"params": params["lm_head.weight"]},
        {"params": params["norm.weight"]},
    ]
    optimizer = MuonAdamW(groups)
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False, True, False, True, False]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3, 0.25, 0.25, 1e-3, 1e-3]
    optimizer.add_param_group({"params": [params["first.bias"]]})
    assert optimizer.param_groups[-1]["use_muon"] is False
    assert not any(group["use_muon"] for group in MuonAdamW(ours.parameters(), use_muon=False).param_groups)


def test_a_group_that_is_refused_leaves_nothing() -> None:
    ours = model()
    optimizer = MuonAdamW([ours["first"].weight])
    with pytest.raises(ValueError, match="MuonAdamW: params must be matrices"):
        optimizer.add_param_group({"params": [ours["first"].bias], "use_muon": True})
    with pytest.raises(ValueError, match="some parameters appear"):
        optimizer.add_param_group({"params": [ours["second"].weight, ours["first"].bias, ours["first"].weight]})
    with pytest.raises(TypeError, match="order"):
        optimizer.add_param_group({"params": {ours["second"].weight}})
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [ours["second"].weight, "no tensor"]})
    assert len(optimizer.param_groups) == 1


def test_a_group_may_change_sides() -> None:
    p = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = MuonAdamW([p])
    for use_muon in (True, False, True):
        optimizer.param_groups[0]["use_muon"] = use_muon
        p.grad = torch.randn_like(p)
        optimizer.step()
    assert set(optimizer.state[p]) == {"step", "momentum_buffer", "exp_avg", "exp_avg_sq"}
    vector = nn.Parameter(torch.randn(3))
    vector.grad = torch.randn(3)
    optimizer = MuonAdamW([vector])
    optimizer.param_groups[0]["use_muon"] = True
    with pytest.raises(ValueError, match="params must be matrices"):
        optimizer.step()
