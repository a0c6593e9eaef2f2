"""A second backend: a device is one file, and nothing else knows of it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import compiled_optim
from compiled_optim import graphs
from compiled_optim._engine import settings
from compiled_optim._engine.kernels import backends
from compiled_optim._engine.kernels.trace import Signature, Traced
from compiled_optim._engine.torch_private.inductor import Lowered

Entry = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int64,
    *(ctypes.POINTER(t) for t in (ctypes.c_size_t, ctypes.c_int64, ctypes.c_int32, ctypes.c_double, ctypes.c_size_t)),
    ctypes.c_int64,
    ctypes.c_size_t,
)


class FakeBackend:
    """Takes float64. Its kernels are Python, which runs the graph of a rule on one tensor after another."""

    name, device_type, graph_device = "fake", "cpu", "cpu"
    dtypes = frozenset({torch.float64})
    sparse = asynchronous = False
    long_launch = 1
    suffix, language = ".fake", "python"
    compiled = False

    def __init__(self, identity: str) -> None:
        self._identity = identity
        self.given: list[int] = []  # to kernels, as context
        self.launched: list[tuple[int, int]] = []  # how many tensors, and the context

    def identity(self) -> tuple[str]:
        return (self._identity,)

    def lower(self, traced: Traced, *, portable: bool = False) -> Lowered:
        return Lowered(traced.graph.code, tuple(range(len(traced.inputs))))

    def full_source(self, signature: Signature, lowered: Lowered) -> str:
        return f"# {signature.name}\n{lowered.source}"

    def program(self, signature: Signature, lowered: Lowered) -> tuple[bytes, list[str]]:
        return self.full_source(signature, lowered).encode(), []

    def load(self, path: Path, signature: Signature) -> tuple[int, object]:
        namespace: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": torch.inf, "nan": torch.nan}
        exec(path.read_text(), namespace)
        flat, names = signature.flat_dtypes, signature.scalars

        def entry(
            tensors: int, table: Any, begins: Any, rows: Any, scalars: Any, addresses: Any, columns: int, context: int
        ) -> None:
            self.launched.append((tensors, context))
            for t in range(tensors):
                length = begins[t + 1] - begins[t]
                memory = [
                    (ctypes.c_char * (length * dtype.itemsize)).from_address(table[t * len(flat) + i])
                    for i, dtype in enumerate(flat)
                ]
                inputs = [torch.frombuffer(m, dtype=d) for m, d in zip(memory, flat, strict=True)]
                row = [scalars[rows[t] * columns + i] for i in range(len(names))]
                namespace["forward"](None, *inputs, *(torch.tensor(s, dtype=signature.scalar_dtype) for s in row))

        function = Entry(entry)
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        return address, function

    def contexts(
        self, keepalive: object, signature: Signature, device: torch.device, tensors: int
    ) -> Callable[[], int]:
        assert isinstance(keepalive, Entry)
        assert device == torch.device("cpu")
        assert tensors == 2

        def context() -> int:
            self.given.append(2**40 + len(self.given))
            return self.given[-1]

        return context

    def is_capturing(self, device: torch.device) -> bool:
        return False


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeBackend]:
    backend = FakeBackend(str(tmp_path))
    monkeypatch.setattr(backends, "BACKENDS", (backend, *backends.BACKENDS))
    compiled_optim.cache_clear()
    yield backend
    compiled_optim.cache_clear()


def step(cls: Any, steps: int = 3, **options: Any) -> tuple[Any, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float64, torch.float32, torch.float64)
    params = [Parameter(torch.randn(3, 5, dtype=d, generator=generator)) for d in dtypes]
    optimizer = cls(params, lr=0.1, weight_decay=0.1, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        optimizer.step()
    return optimizer, [p.detach() for p in params]


def test_one_step_runs_the_kernels_of_two_backends(fake: FakeBackend) -> None:
    optimizer, actual = step(compiled_optim.AdamW, compiled=True)
    _, expected = step(torch.optim.AdamW)
    torch.testing.assert_close(actual, expected)
    assert fake.launched == [(2, context) for context in fake.given[-3:]]
    rows = {row.kernel: row for row in compiled_optim.explain(optimizer)}
    on = "AdamW(decoupled_weight_decay)"
    assert rows.keys() == {f"{on}[float64 on fake]", f"{on}[float32]"}
    row = rows[f"{on}[float64 on fake]"]
    assert (row.execution, row.device, row.dtype) == ("multi_tensor", "cpu", "float64")
    assert (row.tensors, row.elements) == (2, 30)
    assert (row.launches, row.bytes_per_element, row.origin, row.reason) == (1, 4 * 8, "compiled", "")


def test_its_kernels_are_kept_on_disk_under_its_suffix(fake: FakeBackend) -> None:
    def kept() -> set[Path]:
        root = settings.cache_directory()
        assert root is not None
        return set(root.glob("*.fake"))

    before = kept()
    step(compiled_optim.AdamW, compiled=True)
    (file,) = kept() - before
    assert file.read_text().startswith("# AdamW(decoupled_weight_decay)[float64 on fake]\n")
    compiled_optim.cache_clear()
    optimizer, _ = step(compiled_optim.AdamW, compiled=True)
    assert {row.origin for row in compiled_optim.explain(optimizer)} == {"disk"}


def test_it_may_take_no_sparse_gradients(fake: FakeBackend, lenient: None) -> None:
    p = Parameter(torch.ones(4, 2, dtype=torch.float64))
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2, dtype=torch.float64), p.shape)
    optimizer = compiled_optim.SparseAdam([p], compiled=True)
    with pytest.warns(UserWarning, match="kernels on fake update every row"):
        optimizer.step()
    assert p[0].eq(1).all()
    assert p[1].lt(1).all()
    assert not fake.launched


def test_its_kernels_are_recorded(fake: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    (selection,) = [s for s in graphs.selections() if s.name == "AdamW"]
    text = graphs.record(selection, {})
    assert "\n## fake\n\n```python\n" in text
    assert "def forward" in text
