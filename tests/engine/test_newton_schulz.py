"""Newton-Schulz iterations of lists of matrices, against torch.optim's of one, and both against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compiled_optim._engine import newton_schulz as module
from compiled_optim._engine.newton_schulz import newton_schulz, newton_schulz_of_list
from compiled_optim._engine.torch_private import cpu

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "random": torch.randn,
    "low rank": lambda n, m: torch.randn(n, 5) @ torch.randn(5, m),
    "low rank with noise": lambda n, m: torch.randn(n, 5) @ torch.randn(5, m) + 0.01 * torch.randn(n, m),
    "ill-conditioned": lambda n, m: with_singular_values(n, m, torch.logspace(0, -6, min(n, m))),
    "power law": lambda n, m: with_singular_values(n, m, 1.0 / torch.arange(1, min(n, m) + 1)),
}


def with_singular_values(n: int, m: int, values: Tensor) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(size, len(values)))[0] for size in (n, m))
    return (left * values) @ right.T


def of_list(
    matrices: list[Tensor], steps: int = 5, eps: float = 1e-7, coefficients: Any = COEFFICIENTS
) -> list[Tensor]:
    """Of copies, in bfloat16 as Muon gives them."""
    return newton_schulz_of_list([m.to(torch.bfloat16, copy=True) for m in matrices], *coefficients, eps, steps)


def as_torch(matrix: Tensor, steps: int = 5, eps: float = 1e-7, coefficients: Any = COEFFICIENTS) -> Tensor:
    """What a step of torch.optim.Muon adds to a parameter of zeros."""
    p = torch.nn.Parameter(torch.zeros_like(matrix))
    p.grad = matrix.clone()
    options = {"ns_steps": steps, "eps": eps, "ns_coefficients": coefficients}
    torch.optim.Muon([p], lr=1.0, momentum=0.0, nesterov=False, adjust_lr_fn=None, **options).step()
    rows, columns = matrix.shape
    return -p.detach() / max(1, rows / columns) ** 0.5


def error(found: Tensor, matrix: Tensor, **options: Any) -> float:
    """Against the iterations in float64."""
    coefficients = options.pop("coefficients", COEFFICIENTS)
    exact = newton_schulz(matrix.double(), *coefficients, options.get("eps", 1e-7), options.get("steps", 5))
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 7), (7, 1), (40, 40)], ids=str)
def test_a_matrix_alone_is_bit_for_bit_as_in_torch(shape: Any) -> None:
    matrix = torch.randn(shape)
    mine = newton_schulz(matrix.bfloat16(), *COEFFICIENTS, 1e-7, 5).float()
    torch.testing.assert_close(mine, as_torch(matrix), rtol=1e-6, atol=0)


# in stacks; in blocks, which divide the rows or not; wide, where iterations are merged
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (600, 512), (530, 1061)], ids=str)
def test_a_list_is_no_less_exact_than_torch(shape: Any, kind: str) -> None:
    matrices = [KINDS[kind](*shape) for _ in range(2 if max(shape) > 100 else 20)]
    mine, torchs = (
        sum(error(found, m) for found, m in zip(results, matrices, strict=True))
        for results in (of_list(matrices), [*map(as_torch, matrices)])
    )
    assert mine <= 1.05 * torchs, "5 % is the noise of rounding where the iterations are the same"


@pytest.mark.parametrize(
    ("shape", "count", "options"),
    [
        ((20, 30), 20, {"steps": 1}),
        ((20, 30), 20, {"coefficients": (1.5, -0.5, 0.0)}),
        ((520, 1050), 1, {"steps": 2}),
        ((520, 1050), 1, {"steps": 7}),
        ((520, 1050), 1, {"coefficients": (1.5, -0.5, 0.0)}),
    ],
    ids=str,
)
def test_other_numbers_of_iterations_and_coefficients(shape: Any, count: int, options: Any) -> None:
    matrices = [torch.randn(shape) for _ in range(count)]
    mine, torchs = (
        sum(error(found, m, **options) for found, m in zip(results, matrices, strict=True))
        for results in (of_list(matrices, **options), [as_torch(m, **options) for m in matrices])
    )
    assert mine <= 1.05 * torchs


def test_no_iteration_divides_by_the_norm() -> None:
    for matrix in (torch.randn(4, 6), torch.randn(512, 512), 1e-9 * torch.randn(4, 6)):
        expected = matrix / matrix.norm().clamp(min=1e-7)
        torch.testing.assert_close(of_list([matrix], steps=0)[0].float(), expected, rtol=2**-7, atol=1e-12)


def test_a_list_of_different_shapes_keeps_its_order() -> None:
    shapes = [(4, 6), (520, 520), (6, 4), (4, 6), (1, 5), (5, 1), (520, 520), (0, 3), (3, 0), (0, 0)]
    matrices = [torch.randn(shape) for shape in shapes]
    found = of_list(matrices)
    assert [m.shape for m in found] == [torch.Size(shape) for shape in shapes]
    for result, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(
            result.float(), as_torch(matrix).float() if matrix.numel() else matrix, rtol=0, atol=0.05
        )
    assert of_list([]) == []


@pytest.mark.parametrize("shape", [(8, 6), (520, 520), (520, 1050)], ids=str)
def test_a_matrix_of_zeros_stays_so_and_nan_spreads_in_its_matrix_only(shape: Any) -> None:
    for bad in (float("nan"), float("inf")):
        matrices = [torch.randn(shape), torch.zeros(shape), torch.randn(shape), torch.randn(shape)]
        matrices[2][1, 2] = bad
        good, zeros, spoilt, other = of_list(matrices)
        assert zeros.count_nonzero() == 0
        assert bool(spoilt.isnan().all())
        assert bool(good.isfinite().all())
        assert bool(other.isfinite().all())
    assert bool(of_list([torch.zeros(shape)], eps=0.0)[0].isnan().all()), "as torch: 0 / 0"


@pytest.mark.parametrize("shape", [(6, 9), (520, 530)], ids=str)
def test_matrices_that_are_not_contiguous(shape: Any) -> None:
    matrix = torch.randn(shape)
    strided = torch.zeros(2 * shape[0], 3 * shape[1], dtype=torch.bfloat16)[::2, ::3]
    strided.copy_(matrix)
    found = newton_schulz_of_list([strided, matrix.bfloat16().T.contiguous().T], *COEFFICIENTS, 1e-7, 5)
    for result in found:
        torch.testing.assert_close(result.float(), as_torch(matrix), rtol=0, atol=0.05)


def test_a_cpu_without_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    for matrix in (torch.randn(6, 9), torch.randn(520, 1050)):
        assert error(of_list([matrix, matrix])[0], matrix.bfloat16()) < 2e-3


def test_stacks_are_cut_where_they_would_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STACK_ON_CPU", 100)
    matrices = [torch.randn(5, 6) for _ in range(8)]
    for result, matrix in zip(of_list(matrices), matrices, strict=True):
        torch.testing.assert_close(result.float(), as_torch(matrix), rtol=0, atol=0.05)


def test_matrices_on_several_devices_are_not_stacked_together() -> None:
    found = of_list([torch.randn(4, 6), torch.empty(4, 6, device="meta"), torch.randn(4, 6)])
    assert [m.device.type for m in found] == ["cpu", "meta", "cpu"]
