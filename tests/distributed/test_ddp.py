"""A step in one pass behind DistributedDataParallel, whose buckets hold the gradients."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from beside_torch import both
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import compiled_optim
from compiled_optim import AdamW, explain


@both
@pytest.mark.parametrize("views", [False, True], ids=["copies", "views of buckets"])
def test_accumulation_without_sync_is_clipped_and_averaged_once(mesh: Any, compiled: bool, views: bool) -> None:
    torch.set_default_dtype(torch.float64)
    models = [torch.nn.Linear(3, 2)]
    models.append(copy.deepcopy(models[0]))
    ours, theirs = (DistributedDataParallel(m, gradient_as_bucket_view=views) for m in models)
    one = AdamW(ours.parameters(), compiled=compiled, max_grad_norm=0.1, ema_decay=0.9)
    stock = torch.optim.AdamW(theirs.parameters())
    average = AveragedModel(theirs, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        for micro in range(3):
            x = torch.randn(4, 3)
            for model in (ours, theirs):
                with model.no_sync() if micro < 2 else nullcontext():
                    model(x).square().sum().backward()
        one.step()
        norm = clip_grad_norm_(theirs.parameters(), 0.1)
        stock.step()
        average.update_parameters(theirs)
        torch.testing.assert_close(one.grad_norm, norm, rtol=1e-12, atol=0)
        one.zero_grad(set_to_none=not views)
        stock.zero_grad(set_to_none=not views)
    torch.testing.assert_close([*ours.parameters()], [*theirs.parameters()], rtol=1e-12, atol=1e-14)
    with one.averaged():
        torch.testing.assert_close([*ours.parameters()], [*average.parameters()], rtol=1e-12, atol=1e-14)


@both
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.usefixtures("mesh")
def test_steps_between_the_reductions(compiled: bool) -> None:
    from compiled_optim.integrations import ddp

    class Mine(AdamW):
        """Of one's own, and it says what was built."""

        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)
            built.append(self)

    built: list[AdamW] = []
    ddp.register(Mine)
    torch.set_default_dtype(torch.float64)
    models = [torch.nn.Linear(3, 2)]
    models.append(copy.deepcopy(models[0]))
    ours = DistributedDataParallel(models[0])
    with pytest.raises(ValueError, match="AdamW: lr must be at least 0, got -1"):
        ours._register_fused_optim(AdamW, lr=-1)
    with pytest.raises(TypeError, match="betas must have 2 values"):
        DistributedDataParallel(models[0])._register_fused_optim(AdamW, betas=0.5)
    for whole in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        with pytest.raises(ValueError, match="max_grad_norm and skip_nonfinite must not be given"):
            DistributedDataParallel(models[0])._register_fused_optim(AdamW, **whole)
    DistributedDataParallel(models[0])._register_fused_optim(compiled_optim.Muon)  # of a model of matrices
    ours = DistributedDataParallel(models[0])
    ours._register_fused_optim(Mine, lr=0.1, compiled=compiled)
    built.clear()  # of the check of the options
    stock = torch.optim.AdamW(models[1].parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(4, 3)
        for model in (ours, models[1]):
            model.zero_grad()
            model(x).square().sum().backward()
        stock.step()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)  # DDP still fills them
    assert len(built) == 2
    assert {row.execution for optimizer in built for row in explain(optimizer)} == {
        "multi_tensor" if compiled else "eager"
    }
