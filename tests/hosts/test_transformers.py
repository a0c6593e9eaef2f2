"""transformers' Trainer on tiny models that are made here, and peft's adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import MISSING, Way, assert_same

pytest.importorskip("transformers", **MISSING)
pytest.importorskip("accelerate", **MISSING)

from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import compiled_optim
from compiled_optim import lr_scheduler

LR = 0.01
STEPS = 6
WORDS = torch.arange(24 * 12).reshape(24, 12) ** 2 % 61


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config).double()


def llama() -> Any:
    torch.manual_seed(0)
    size = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 12}
    return LlamaForCausalLM(
        LlamaConfig(**size, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    ).double()


def train(directory: Path, model: Any, optimizer: Any = None, resume: bool = False, **options: Any) -> Any:
    """The Trainer that has trained ``model`` with a class and its options, or a pair of optimizer and schedule."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    settings = {"output_dir": str(directory), "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 0}
    settings |= {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": LR, "weight_decay": 0.1}
    settings |= {"save_strategy": "no", "logging_strategy": "no"}
    callbacks = options.pop("callbacks", [])
    data = [{"input_ids": row, "labels": row} for row in WORDS]
    given = {"optimizers" if isinstance(optimizer[0], torch.optim.Optimizer) else "optimizer_cls_and_kwargs": optimizer}
    trainer = Trainer(model, TrainingArguments(**settings | options), train_dataset=data, callbacks=callbacks, **given)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def theirs() -> Any:
    return torch.optim.AdamW, {"lr": LR}


def mine(way: Way, **options: Any) -> Any:
    return compiled_optim.AdamW, {"lr": LR, **options, **way.options()}


@pytest.mark.parametrize("model", [gpt2, llama], ids=["GPT-2", "Llama"])
@pytest.mark.host("Trainer", "GPT-2 and Llama, two param groups, clipping, the linear schedule, accumulation")
def test_training(way: Way, tmp_path: Path, model: Any) -> None:
    options = {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2, "warmup_steps": 2}
    ours = train(tmp_path, model(), mine(way), **options)
    stock = train(tmp_path, model(), theirs(), **options)
    assert_same(ours.model, stock.model, 1e-11)
    assert len(ours.optimizer.param_groups) == 2
    way.check(ours.optimizer)


@pytest.mark.host("Trainer", "bf16")
def test_bfloat16(way: Way, tmp_path: Path) -> None:
    ours, stock = (train(tmp_path, gpt2().float(), what, bf16=True) for what in (mine(way), theirs()))
    assert_same(ours.model, stock.model, 1e-4)
    way.check(ours.optimizer)


@pytest.mark.host("Trainer", "Adafactor")
def test_adafactor(way: Way, tmp_path: Path) -> None:
    ours = train(tmp_path, gpt2(), (compiled_optim.Adafactor, {"lr": LR, **way.options()}))
    stock = train(tmp_path, gpt2(), (torch.optim.Adafactor, {"lr": LR}))
    assert_same(ours.model, stock.model, 1e-8)  # the bias of the keys has gradients of rounding errors only
    way.check(ours.optimizer, reduces=True)


class Pair(torch.optim.Optimizer):
    """torch's Muon and AdamW in one, for the Trainer."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)
        self.parts = []
        for i, group in enumerate(self.param_groups):
            for is_2d, kind in ((True, torch.optim.Muon), (False, torch.optim.AdamW)):
                part = [p for p in group["params"] if (p.dim() == 2) == is_2d]
                given = {"adjust_lr_fn": "match_rms_adamw"} if is_2d else {"betas": (0.9, 0.95)}
                if part:
                    self.parts.append((i, kind(part, weight_decay=group["weight_decay"], eps=1e-8, **given)))

    def step(self, closure: Any = None) -> None:
        for i, optimizer in self.parts:  # Accelerate replaces the groups
            optimizer.param_groups[0]["lr"] = self.param_groups[i]["lr"]
            optimizer.step()


@pytest.mark.host("Trainer", "MuonAdamW, with the linear schedule, resumed")
def test_muon_adamw(way: Way, tmp_path: Path) -> None:
    given = (compiled_optim.MuonAdamW, {"lr": LR, **way.options()})
    whole = train(tmp_path, gpt2(), given)
    stock = train(tmp_path, gpt2(), (Pair, {"lr": LR}))
    assert_same(whole.model, stock.model, 1e-9)
    assert [group["use_muon"] for group in whole.optimizer.param_groups] == [True, False]
    way.check(whole.optimizer, reduces=True)
    train(tmp_path, gpt2(), given, callbacks=[Stop()], save_strategy="steps", save_steps=STEPS // 2)
    assert_same(train(tmp_path, gpt2(), given, resume=True).model, whole.model, 1e-9)


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == STEPS // 2


@pytest.mark.host("Trainer", "resume: ours, from torch's and by torch's")
def test_resume(way: Way, tmp_path: Path) -> None:
    whole = train(tmp_path, gpt2(), theirs())
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    for i, (saved, resumed) in enumerate(((mine(way), mine(way)), (mine(way), theirs()), (theirs(), mine(way)))):
        train(tmp_path / str(i), gpt2(), saved, callbacks=[Stop()], **saving)
        second = train(tmp_path / str(i), gpt2(), resumed, resume=True)
        assert second.state.global_step == STEPS
        assert_same(second.model, whole.model, 1e-11)
    way.check(second.optimizer)


@pytest.mark.host("Trainer", "an optimizer and a schedule of ours, handed over; clipping and EMA in the step")
def test_handed_over(way: Way, tmp_path: Path) -> None:
    model, plain = gpt2(), gpt2()
    options = {"lr": LR, "max_grad_norm": 0.5, "ema_decay": 0.5}
    optimizer: Any = way.of("AdamW")(model.parameters(), **options)
    ours = train(tmp_path, model, (optimizer, lr_scheduler.CosineAnnealingLR(optimizer, STEPS)), max_grad_norm=0)
    stock = torch.optim.AdamW(plain.parameters(), lr=LR)
    train(tmp_path, plain, (stock, torch.optim.lr_scheduler.CosineAnnealingLR(stock, STEPS)), max_grad_norm=0.5)
    assert_same(model, plain, 1e-11)
    with optimizer.averaged():
        assert (model.lm_head.weight - plain.lm_head.weight).abs().max() > 1e-3
    way.check(ours.optimizer)


@pytest.mark.host("Trainer", "an attached schedule beside its own")
def test_attached(way: Way, tmp_path: Path) -> None:
    model = gpt2()
    optimizer: Any = way.of("AdamW")(model.parameters(), lr=LR)
    optimizer.attach(lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS))
    with pytest.warns(UserWarning, match="moves the learning rate that the attached CosineAnnealingLR moves"):
        trainer = train(tmp_path, model, (optimizer, None))
    way.result = "a warning says that they take turns"
    way.check(trainer.optimizer)


def with_adapter(config: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(gpt2(), config)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.host("peft", "LoRA and DoRA in Trainer")
def test_adapters(way: Way, tmp_path: Path, dora: bool) -> None:
    peft = pytest.importorskip("peft", **MISSING)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], use_dora=dora, lora_dropout=0.0, fan_in_fan_out=True)
    ours, stock = (train(tmp_path, with_adapter(config), what) for what in (mine(way), theirs()))
    assert_same(ours.model, stock.model, 1e-11)
    trained = [n for n, p in ours.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    way.check(ours.optimizer)
