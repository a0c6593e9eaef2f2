"""Newton-Schulz iterations, which make the singular values of a matrix 1 or nearly so: as torch.optim.Muon, and faster.

An iteration is ``X <- a X + (b G + c G G) X`` with ``G = X X^T``. Nearly all the time goes to its products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.torch_private import cpu

# Matrices with fewer rows and columns are stacked: their products take less time than calling them one by one.
_LEAST_IN_BLOCKS = 512
# The elements of one stack: on the CPU it stays in cache, and elsewhere this bounds its temporaries.
_STACK_ON_CPU, _STACK_ELSEWHERE = 1 << 18, 1 << 26


def newton_schulz(x: Tensor, a: float, b: float, c: float, eps: float, steps: float) -> Tensor:
    """A matrix, or each of a stack, divided by its norm or ``eps`` and after ``steps`` iterations in its own dtype.

    Of a bfloat16 matrix it makes what torch.optim.Muon does, bit for bit. A stack has the same iterations, but its
    norms are not rounded to bfloat16.
    """
    if x.size(-2) > x.size(-1):
        return newton_schulz(x.mT, a, b, c, eps, steps).mT
    norm = x.norm() if x.dim() == 2 else torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    addmm: Any = torch.addmm if x.dim() == 2 else torch.baddbmm
    x = (x / norm.clamp(min=eps)).to(x.dtype)
    for _ in range(int(steps)):
        gram = x @ x.mT
        # torch.baddbmm takes alpha=0 for 1 in bfloat16
        poly = addmm(gram, gram, gram, beta=b, alpha=c) if c else gram * b
        x = addmm(x, poly, x, beta=a)
    return x


def newton_schulz_of_list(
    matrices: list[Tensor], a: float, b: float, c: float, eps: float, steps: float
) -> list[Tensor]:
    """`newton_schulz` of each, in less time and no further from the exact iterations; overwrites what it is given.

    Small matrices of one shape, and all on a GPU, are stacked for batched products. In host memory, products of large
    ones are computed in half where they are symmetric, and in float32 where the CPU has no instructions for bfloat16.
    """
    results = list(matrices)
    alike: dict[tuple[torch.Size, torch.device, torch.dtype], list[int]] = {}
    for i, m in enumerate(matrices):
        alike.setdefault((m.shape, m.device, m.dtype), []).append(i)
    for (shape, device, dtype), places in alike.items():
        on_cpu = device.type == "cpu"
        if on_cpu and not cpu.multiplies_bfloat16():
            dtype = torch.float32
        its = [matrices[i].to(dtype) for i in places]
        if on_cpu and min(shape) >= _LEAST_IN_BLOCKS and steps:
            made = _in_blocks(its, a, b, c, eps, int(steps))
        else:
            most = max(1, (_STACK_ON_CPU if on_cpu else _STACK_ELSEWHERE) // max(1, shape.numel()))
            made = _in_stacks(its, most, a, b, c, eps, steps)
        for i, x in zip(places, made, strict=True):
            results[i] = x
    return results


def _in_stacks(
    matrices: list[Tensor], most: int, a: float, b: float, c: float, eps: float, steps: float
) -> Iterator[Tensor]:
    """Matrices of one shape, up to ``most`` at once."""
    for i in range(0, len(matrices), most):
        part = matrices[i : i + most]
        if len(part) == 1:
            yield newton_schulz(part[0], a, b, c, eps, steps)
        else:
            yield from newton_schulz(torch.stack(part), a, b, c, eps, steps)


def _in_blocks(matrices: list[Tensor], a: float, b: float, c: float, eps: float, steps: int) -> Iterator[Tensor]:
    """Matrices of one shape, of which all that is symmetric is computed in half.

    The first three iterations of a wide matrix are merged: with ``A = a I + b G + c G G`` they are ``G <- A G A`` and,
    at last, ``X <- Q X`` with ``Q`` the product of the ``A``. Merging more, or of smaller matrices, would let rounding
    errors of ``G`` grow beyond those of torch.optim. After three iterations, where ``G`` is near ``I``, the
    polynomial is written in ``G - I``, which halves the error.
    """
    tall = matrices[0].size(0) > matrices[0].size(1)
    x = matrices[0].mT if tall else matrices[0]
    n = x.size(0)
    merged = min(steps, 3 if x.size(1) >= 2 * n else 1)
    parts = [(merged, 0), *((1, int(i >= 3)) for i in range(merged, steps))]
    gram, poly, other, q = x.new_empty(4, n, n)
    eye = torch.eye(n, dtype=x.dtype)
    spare = torch.empty_like(x)
    for x in matrices:
        x, y = (x.mT if tall else x), spare
        for k, (count, shift) in enumerate(parts):
            _symmetric(gram, x, x.mT, eye if shift else None, beta=-1.0)
            scale = 1.0
            if k == 0:  # X is divided by its norm here, not in a pass of its own
                square = gram.diagonal().sum(dtype=torch.float32)
                scale = square.sqrt().clamp(min=eps).reciprocal().item()
                gram.mul_(scale * scale)
            own = a + b * shift + c * shift
            for i in range(count):  # A is own I + poly
                _symmetric(poly, gram, gram, gram, beta=b + 2 * c * shift, alpha=c)
                if i < count - 1:
                    _symmetric(other, poly, gram, gram, beta=own)
                    _symmetric(gram, poly, other, other, beta=own)
                if i == 0:
                    q, poly = poly, q
                else:  # Q is own**i I + q
                    torch.add(q, poly, alpha=own ** (i - 1), out=other)
                    _symmetric(other, poly, q, other, beta=own)
                    q, other = other, q
            torch.addmm(x, q, x, beta=own**count * scale, alpha=scale, out=y)
            x, y = y, x
        yield x.mT if tall else x
        spare = y


def _symmetric(out: Tensor, u: Tensor, v: Tensor, add: Tensor | None, beta: float, alpha: float = 1.0) -> None:
    """Writes ``beta * add + alpha * u @ v``, which is known to be symmetric: blocks on and above the diagonal are
    computed, the others mirrored."""
    size = max(192, out.size(0) // 8)
    for begin in range(0, out.size(0), size):
        end = min(begin + size, out.size(0))
        block = out[:end, begin:end]
        if add is None:
            torch.mm(u[:end], v[:, begin:end], out=block)
        else:
            torch.addmm(add[:end, begin:end], u[:end], v[:, begin:end], beta=beta, alpha=alpha, out=block)
        out[begin:end, :begin] = out[:begin, begin:end].T
