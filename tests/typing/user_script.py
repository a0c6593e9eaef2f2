"""A user's program, for type checkers: an optimizer of one's own, a training loop, a schedule, an average.

``make lint`` checks it with mypy --strict, and the tests run it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import compiled_optim
from compiled_optim import AdamW, Optimizer, explain
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, counter, flag, number
from compiled_optim.lr_scheduler import CosineAnnealingLR, warmup
from compiled_optim.swa_utils import AveragedModel, get_ema_avg_fn


class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675)."""

    lr: float | Tensor = number(default=1e-4, low=0, unit="parameter", help="learning rate")
    betas: tuple[float, float] = number(default=(0.9, 0.99), low=0, below=1, help="decay of m per step")
    weight_decay: float = number(default=0.0, low=0, unit="1 / lr", help="decay of the parameter per step")
    cautious: bool = flag(default=False, switch=True, kw_only=True, help="skip elements that the gradient opposes")

    step_count = counter()
    exp_avg = buffer(help="first moment m")

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        return {"beta1": h.beta1, "beta2": h.beta2, "lr": h.lr, "decay": 1 - h.lr * h.weight_decay}

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        direction = (s.exp_avg * k.beta1 + g * (1 - k.beta1)).sign()
        if on.cautious:
            direction = direction.masked_fill(direction * g < 0, 0)
        s.exp_avg = s.exp_avg * k.beta2 + g * (1 - k.beta2)
        return p * k.decay - direction * k.lr


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Takes any optimizer of torch's, ours included."""
    schedule = CosineAnnealingLR(optimizer, T_max=steps)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def main(compiled: bool = False) -> None:
    model = nn.Linear(3, 1)
    lion = Lion(model.parameters(), 1e-3, betas=(0.9, 0.95), cautious=True, compiled=compiled)
    train(model, lion, steps=3)

    groups: list[dict[str, Any]] = [{"params": [model.weight], "lr": 1e-2}, {"params": [model.bias]}]
    adamw = AdamW(groups, lr=torch.tensor(1e-3), weight_decay=0.1, compiled="multi_tensor" if compiled else False)
    schedule = warmup(CosineAnnealingLR(adamw, T_max=3), 2, "cosine")
    assert_type(schedule.value(2), float)
    assert_type(schedule.value(torch.arange(3.0)), Tensor)
    adamw.attach(schedule)
    average_fn = get_ema_avg_fn(lambda n: min(0.9, n / 4))
    average = AveragedModel(model, avg_fn=average_fn, compiled=compiled)
    average_fn.decay = 0.9

    def closure() -> Tensor:
        adamw.zero_grad()
        loss: Tensor = model(torch.ones(4, 3)).square().mean()
        torch.autograd.backward(loss)
        return loss

    for _ in range(3):
        loss = adamw.step(closure)
        assert_type(loss, Tensor)
        average.update_parameters(model)
    adamw.detach(schedule)
    assert_type(adamw.step(), None)

    restored = AdamW(groups)
    restored.load_state_dict(adamw.state_dict())
    for row in explain(adamw):
        print(row.execution, row.tensors, row.reason)
    print(compiled_optim.cache_info().kernels)


def refused_by_type_checkers(params: list[nn.Parameter]) -> None:
    """Never called: an ignore that is not needed is an error under --strict."""
    AdamW(params, compiled="multitensor")  # type: ignore[arg-type]
    AdamW(params, learning_rate=0.1)  # type: ignore[call-arg]
    Lion(params, "0.1")  # type: ignore[arg-type]
    Lion(params, 0.1, (0.9, 0.99), 0.0, True)  # type: ignore[call-arg]


if __name__ == "__main__":
    main()
