"""Norms of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def total_norm(grads: Sequence[Tensor], norm_type: float, *, compiled: bool) -> float | Tensor:
    """The norm of all gradients."""
    if not grads:
        return 0.0
    dense = [g.coalesce().values() if g.is_sparse else g for g in grads]
    norms = [torch.linalg.vector_norm(g, norm_type, dtype=torch.float64) for g in dense]
    total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), norm_type)
    return float(total) if total.is_cpu else total
