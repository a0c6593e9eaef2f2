"""What a CUDA graph of a step needs: addresses that stay, and no value of the device read by the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_torch import assert_same
from cases import CLASSES, rich_options, with_all_numbers
from loops import batch, build, compile_alone, train
from torch import Tensor

from compiled_optim import ASGD, SGD, AdamW
from compiled_optim.testing import assert_compiles

CAPTURABLE = [cls for cls in CLASSES if "capturable" in cls.rule.declaration.options]
each_capturable = pytest.mark.parametrize("cls", CAPTURABLE, ids=lambda cls: cls.__name__)


def update(optimizer: Any, x: Tensor) -> Tensor:
    optimizer.step()
    optimizer.zero_grad()
    return x + 1


def buffers(optimizer: Any) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


@pytest.mark.parametrize(
    ("cls", "compiled"),
    [(SGD, False), (AdamW, False), (ASGD, False), (AdamW, True)],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_addresses_stay(cls: Any, compiled: bool) -> None:
    model, optimizer = build(cls, options={**rich_options(cls), "compiled": compiled})
    step = compile_alone(train)
    step(model, optimizer, None, *batch(0))
    step(model, optimizer, None, *batch(1))
    tensors = [*model.trained, *buffers(optimizer)]
    before = [t.data_ptr() for t in tensors]
    for i in range(3):
        step(model, optimizer, None, *batch(i))
    assert [t.data_ptr() for t in [*model.trained, *buffers(optimizer)]] == before


def test_cuda_graphs_are_told() -> None:
    """What a graph takes in and stays in place is marked, or a replay would copy it."""
    model, optimizer = build(CLASSES[0])
    compile_alone(train)(model, optimizer, None, *batch(0))
    moments = [t for t in buffers(optimizer) if t.dim()]
    assert moments
    for t in (*model.trained, *moments):
        assert torch._dynamo.utils.get_static_address_type(t) == "unguarded"


@each_capturable
def test_no_value_is_read(cls: Any) -> None:
    """On the meta device, where there are none: to read one is an error."""
    options = with_all_numbers(cls, rich_options(cls))
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in [(3, 4), (2,), (5, 5)]]
    optimizer = cls(params, **options, capturable=True)
    step = compile_alone(update, backend="eager", fullgraph=True)
    for i in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        with assert_compiles(graphs=0 if i else 1):
            step(optimizer, torch.ones(1))
    assert {t.device.type for t in buffers(optimizer)} == {"meta"}
    with pytest.raises(RuntimeError):
        params[0].sum().item()


@pytest.mark.parametrize(
    ("cls", "tensors"),
    [*((cls, False) for cls in CAPTURABLE), (AdamW, True)],
    ids=lambda v: getattr(v, "__name__", "tensor lr" if v else "numbers"),
)
def test_values_of_capturable_steps(cls: Any, tensors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their arithmetic, on CPU where such steps are refused otherwise; every number changes on the way."""
    monkeypatch.setattr("compiled_optim._engine.executions.survey.refuse", lambda optimizer, choices: None)
    options = with_all_numbers(cls, rich_options(cls))
    start = [torch.randn(shape, dtype=torch.float64) for shape in [(3, 4), (), (5, 5)]]
    runs = []
    for capturable in (True, False):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(t.clone()) for t in start]
        chosen = {**options, "capturable": capturable}
        if tensors and capturable:
            chosen["lr"] = torch.tensor(options["lr"], dtype=torch.float64)
        optimizer = cls(params, **chosen)
        step = compile_alone(update, fullgraph=True) if capturable else update
        for i in range(8):
            for p in params:
                p.grad = torch.randn_like(p)
            with assert_compiles(graphs=1 if capturable and i == 0 else 0):
                step(optimizer, torch.ones(1))
            group = optimizer.param_groups[0]
            group["lr"] = group["lr"].mul_(0.9) if isinstance(group["lr"], Tensor) else group["lr"] * 0.9
        runs.append((params, buffers(optimizer)))
    (p, state), (q, expected) = runs
    for actual, value in zip([*p, *state], [*q, *expected], strict=True):
        assert_same(actual, value, 1e-5)  # with the counts of some algorithms in float32
