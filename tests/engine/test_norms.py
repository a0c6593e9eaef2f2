"""The norm of all gradients, native and by torch, against sums of float64; and gradients set to zero in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode

from compiled_optim._engine import process
from compiled_optim._engine.executions.memory import ShortStorageError
from compiled_optim._engine.executions.norms import total_norm

ways = pytest.mark.parametrize("compiled", [True, False], ids=["native", "torch"])
norm_types = pytest.mark.parametrize("norm_type", [2.0, math.inf])
REALS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RELATIVE = {torch.float64: 1e-14}


def reference(tensors: list[Tensor], norm_type: float) -> float:
    """In float64, of elements that are scaled so that no square overflows or underflows."""
    wide = torch.complex128 if any(t.is_complex() for t in tensors) else torch.float64
    dense = [t.to_dense().detach().resolve_conj().to(wide).reshape(-1).abs() for t in tensors]
    elements = torch.cat([*dense, torch.zeros(1, dtype=torch.float64)])
    largest = elements.max()
    if norm_type == math.inf or largest == 0 or not largest.isfinite():
        return largest.item()
    return largest.item() * torch.linalg.vector_norm(elements / largest).item()


def assert_norm(tensors: list[Tensor], norm_type: float = 2.0, compiled: bool = True, relative: float = 3e-7) -> None:
    norm = total_norm(tensors, norm_type, compiled=compiled)
    assert type(norm) is float
    assert norm == pytest.approx(reference(tensors, norm_type), rel=relative, abs=0, nan_ok=True)


@pytest.mark.parametrize("dtype", REALS, ids=str)
@norm_types
def test_sizes_and_scales(dtype: torch.dtype, norm_type: float) -> None:
    for size in (*range(71), 2047, 2048, 2049, 5000):
        for scale in (1.0, 1e-30, 1e30, 1e-160, 1e200):
            x = (torch.randn(size, dtype=torch.float64) * scale).to(dtype)
            if x.isfinite().all():
                assert_norm([x, torch.zeros(3, dtype=dtype)], norm_type, relative=RELATIVE.get(dtype, 2e-7))


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_the_whole_range_of_a_dtype(dtype: torch.dtype) -> None:
    """Elements that a block of one scale hides: the smallest alone, and the largest beside the smallest."""
    limits = torch.finfo(dtype)
    smallest = torch.tensor([limits.smallest_normal * limits.eps], dtype=dtype)
    relative = RELATIVE.get(dtype, 2e-7)
    assert smallest > 0
    assert_norm([smallest.expand(9).clone()], relative=relative)
    assert_norm([smallest.expand(9).clone()], math.inf, relative=0)
    assert_norm([torch.full((3000,), limits.max / 100, dtype=dtype), smallest], relative=relative)
    assert_norm([torch.full((7,), limits.max, dtype=dtype)], math.inf, relative=0)


@ways
@pytest.mark.parametrize("dtype", REALS, ids=str)
@norm_types
@pytest.mark.parametrize("size", [1, 37, 4100])
def test_an_element_that_is_not_finite(dtype: torch.dtype, norm_type: float, size: int, compiled: bool) -> None:
    for place in {0, size // 2, size - 1}:
        for value in (math.inf, -math.inf, math.nan):
            x = torch.randn(size, dtype=dtype)
            x[place] = value
            norm = total_norm([torch.ones(3), x, torch.full((2,), 1e30)], norm_type, compiled=compiled)
            assert math.isnan(norm) if math.isnan(value) else norm == math.inf
    x = torch.tensor([math.inf, math.nan, -math.inf], dtype=dtype)
    assert math.isnan(total_norm([x], norm_type, compiled=compiled))


@ways
def test_norms_that_float32_cannot_hold_the_squares_of(compiled: bool) -> None:
    for scale in (1e30, 1e-30):
        assert_norm([torch.randn(5) * scale, torch.randn(3) * scale], compiled=compiled)
    assert_norm([torch.zeros(4), torch.zeros(0)], compiled=compiled)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "0-d": lambda: torch.tensor(-3.0),
    "empty": lambda: torch.ones(0, 4),
    "a view": lambda: torch.randn(40)[7:20],
    "transposed": lambda: torch.randn(6, 5).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "gaps": lambda: torch.randn(9, 6)[::2, 1:4],
    "overlapping": lambda: torch.randn(4).expand(3, 4),
    "complex": lambda: torch.randn(5, 4, dtype=torch.complex64),
    "complex128": lambda: torch.randn(7, dtype=torch.complex128),
    "conjugated": lambda: torch.randn(5, dtype=torch.complex64).conj(),
    "negated": lambda: torch.randn(5, dtype=torch.complex64).conj().imag,
    "a leaf": lambda: torch.randn(5, requires_grad=True),
    "with a graph": lambda: torch.randn(5, requires_grad=True) * 2,
    "a parameter": lambda: torch.nn.Parameter(torch.randn(5)),
    "a buffer of modules": lambda: torch.nn.Buffer(torch.randn(5)),
    "sparse": lambda: torch.tensor([[0.0, 2.0], [3.0, 0.0]]).to_sparse(),
    "sparse, not coalesced": lambda: torch.sparse_coo_tensor([[1, 1, 0]], [1.0, 2.0, 5.0], (3,)),
    "sparse rows": lambda: torch.sparse_coo_tensor([[1, 1]], torch.ones(2, 4), (3, 4)),
    "hybrid of nothing": lambda: torch.sparse_coo_tensor(torch.zeros(1, 0), torch.zeros(0, 4), (3, 4)),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
}


@ways
@norm_types
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_layouts(layout: str, norm_type: float, compiled: bool) -> None:
    x = LAYOUTS[layout]()
    assert_norm([x], norm_type, compiled)
    assert_norm([torch.randn(3, dtype=torch.float64), x, torch.ones(4, dtype=torch.bfloat16)], norm_type, compiled)
    assert x.layout is LAYOUTS[layout]().layout


def test_an_inference_tensor() -> None:
    with torch.inference_mode():
        x = torch.randn(5)
        assert_norm([x])
    assert_norm([x])


@ways
@norm_types
def test_no_gradients(norm_type: float, compiled: bool) -> None:
    assert total_norm([], norm_type, compiled=compiled) == 0.0
    assert total_norm((), norm_type, compiled=compiled) == 0.0


@pytest.mark.parametrize("dtype", REALS, ids=str)
@norm_types
def test_threads(dtype: torch.dtype, norm_type: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of threads that begin and end inside tensors, some of nothing; each number of threads has one result."""
    tensors = [torch.randn(n).to(d) for n in (70_000, 3, 0, 65, 1, 131_072, 30_001) for d in (dtype, torch.float32)]
    for threads in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(process, "team_size", lambda threads=threads: threads)
        assert_norm(tensors, norm_type, relative=1e-7)
        first, second = (total_norm([*map(torch.clone, tensors)], norm_type, compiled=True) for _ in range(2))
        assert first == second


def test_a_long_pass_holds_its_memory() -> None:
    """One during which other threads run Python: the storages can be resized again afterwards."""
    tensors = [torch.randn(1 << 19), torch.randn(100_000)]
    assert_norm(tensors)
    for t in tensors:
        t.untyped_storage().resize_(0)


@ways
@pytest.mark.parametrize("left", [0, 12])
def test_a_storage_that_is_too_short(left: int, compiled: bool) -> None:
    x = torch.ones(6)
    values = torch.ones(6)
    sparse = torch.sparse_coo_tensor(torch.arange(6)[None], values, (9,))
    for t, grad in ((x, x), (sparse._values(), sparse)):
        t.untyped_storage().resize_(left)
        with pytest.raises(ShortStorageError, match=f"needs a storage of 24 bytes, and its storage has {left}"):
            total_norm([torch.ones(3), grad], 2.0, compiled=compiled)


@ways
@norm_types
def test_another_device_is_not_waited_for(norm_type: float, compiled: bool) -> None:
    """There is no number yet, and where there is none, as on this device, asking for one would raise."""
    norm = total_norm([torch.ones(2), torch.ones(3, device="meta"), torch.ones(2)], norm_type, compiled=compiled)
    assert isinstance(norm, Tensor)
    assert (norm.device.type, norm.dtype, norm.shape) == ("meta", torch.float64, ())


class Operations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_as_many_operations_for_any_number_of_tensors_on_a_device() -> None:
    counts = []
    for tensors in (2, 50):
        with Operations() as operations:
            total_norm([torch.ones(3, device="meta") for _ in range(tensors)], 2.0, compiled=True)
        counts.append(operations.count - tensors)
    assert counts[0] == counts[1]


@ways
def test_gradients_of_parameters(compiled: bool) -> None:
    """Those that have one, of every kind; what the parameters themselves are does not count."""
    params = [torch.nn.Parameter(torch.full((2, 2), 9.0)) for _ in range(5)]
    grads = [torch.ones(2, 2), torch.ones(2, 2).to_sparse(), torch.arange(16.0).view(4, 4)[::2, ::2], torch.eye(2).t()]
    for p, grad in zip(params, grads, strict=False):
        p.grad = grad
    params.append(torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    params[-1].grad = torch.randn(3, dtype=torch.complex64).conj()
    for norm_type in (2.0, math.inf):
        norm = total_norm(params, norm_type, compiled=compiled, of_gradients=True)
        assert norm == pytest.approx(reference([*grads, params[-1].grad], norm_type), rel=3e-7)
    assert total_norm(params[4:5], 2.0, compiled=compiled, of_gradients=True) == 0.0
    grads[2].untyped_storage().resize_(0)
    with pytest.raises(ShortStorageError) as caught:
        total_norm(params, 2.0, compiled=compiled, of_gradients=True)
    assert caught.value.tensor is grads[2]


def test_agrees_with_torch() -> None:
    tensors = [torch.randn(n, dtype=torch.float64) for n in (3, 1000, 64)]
    for norm_type in (2.0, math.inf):
        ours: Any = total_norm(tensors, norm_type, compiled=True)
        assert ours == pytest.approx(get_total_norm(tensors, norm_type).item(), rel=1e-14)
