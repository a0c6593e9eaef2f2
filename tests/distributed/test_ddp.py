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

from compiled_optim import AdamW


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
