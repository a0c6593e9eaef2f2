"""A step of an embedding of which a batch touches 1,000 rows of 100,000, in ours and torch's SparseAdam and Adagrad."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rivals import compare

import compiled_optim

torch.sparse.check_sparse_tensor_invariants.disable()  # or torch warns that they are not checked

ROWS, WIDTH, TOUCHED = 100_000, 64, 1_000


@pytest.mark.parametrize("coalesced", [True, False], ids=["coalesced", "one row in ten repeated"])
@pytest.mark.parametrize("name", ["SparseAdam", "Adagrad"])
def test_sparse_step(name: str, coalesced: bool, benchmark: Any) -> None:
    rows = torch.randperm(ROWS)[:TOUCHED]
    rows = rows.sort().values if coalesced else torch.cat([rows[: TOUCHED - TOUCHED // 10], rows[: TOUCHED // 10]])
    parameter = torch.nn.Parameter(torch.randn(ROWS, WIDTH))
    values = torch.randn(TOUCHED, WIDTH)
    parameter.grad = torch.sparse_coo_tensor(
        rows[None], values, parameter.shape, is_coalesced=coalesced, check_invariants=True
    )
    ours = getattr(compiled_optim, name)([parameter], compiled=True)
    steps = {
        "torch": getattr(torch.optim, name)([parameter]).step,
        "ours eager": getattr(compiled_optim, name)([parameter]).step,
        "ours compiled": ours.step,
    }
    seconds = compare(steps, rounds=300)
    benchmark.extra_info.update(
        sparse_milliseconds={k: round(v * 1e3, 4) for k, v in seconds.items()},
        ratio=round(seconds["torch"] / seconds["ours compiled"], 2),
    )
    print(f"\n{name}, coalesced={coalesced}: {benchmark.extra_info}")
    benchmark.pedantic(ours.step, rounds=100, warmup_rounds=3)
