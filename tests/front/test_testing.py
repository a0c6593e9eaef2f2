"""The test kit: it passes what is right, the README's example first, names what is wrong, and counts compilations."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from compiled_optim import SGD, Adafactor, Muon, NAdam, Optimizer, SparseAdam, cache_clear
from compiled_optim.declare import buffer, counter, number
from compiled_optim.testing import assert_compiles, check

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def lion(tmp_path: Path) -> ModuleType:
    """A user's module that holds the example of the README."""
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "class Lion" in b]
    assert len(code[code.index("class Lion") :].splitlines()) < 30
    file = tmp_path / "lion.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("lion", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_of_the_readme(lion: ModuleType) -> None:
    check(lion.Lion)
    with pytest.raises(ValueError, match=r"Lion: beta2 must be at least 0 and below 1, got 1\.0"):
        lion.Lion([torch.zeros(1)], betas=(0.9, 1.0))


@pytest.mark.parametrize("cls", [SGD, NAdam, SparseAdam, Adafactor, Muon], ids=lambda cls: cls.__name__)
def test_passes_ours(cls: type[Optimizer]) -> None:
    check(cls, {}, foreach=False)


class _Base(Optimizer):
    lr: float = number(default=0.1, low=0)
    memory = buffer()

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        s.memory = s.memory + g
        return p - s.memory * k.lr


class WholeTensor(_Base):
    """Takes a norm, but does not say so."""

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - g / g.norm() * k.lr


class BranchesOnValue(_Base):
    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - g * k.lr if k.lr > 0.05 else p


class HiddenState(_Base):
    """Keeps a step count where no checkpoint finds it."""

    seen = 0

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        HiddenState.seen += 1
        return {"lr": h.lr / HiddenState.seen}


class Unchecked(_Base):
    """Swallows what its declaration refuses."""

    rho: float = number(default=0.5, low=0, below=1)

    def __init__(self, params: Any, rho: float = 0.5, **options: Any) -> None:
        super().__init__(params, **options)


class WideStep(_Base):
    """Counts its steps in scalars of another number."""

    step_count = counter()

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr} if step < 3 else {"lr": h.lr, "extra": 1.0}


class KernelOfEachSize(_Base):
    """Needs a kernel for each number of parameters, which is in the name of a scalar."""

    size = 0

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        KernelOfEachSize.size = len(params)

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr, f"unused_{KernelOfEachSize.size}": 1.0}


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (WholeTensor, "elementwise = False"),
        (BranchesOnValue, "BranchesOnValue"),
        (HiddenState, "values"),
        (Unchecked, "rho.* was not refused"),
        (WideStep, "the same scalars"),
        (KernelOfEachSize, "a second optimizer: 0 graphs and kernels together expected, found 0 graphs and 1 kernels"),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_names_what_is_wrong(cls: type[Optimizer], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(cls, {}, foreach=False)


# ---- assert_compiles


def compile_some(graphs: int, kernels: int) -> None:
    for _ in range(graphs):
        torch.compiler.reset()
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    for dtype in (torch.float32, torch.float64)[:kernels]:
        p = torch.nn.Parameter(torch.ones(1, dtype=dtype))
        p.grad = torch.ones_like(p)
        SGD([p], compiled=True).step()


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ({"n": 3}, {"n": 2}, "2 graphs and kernels together expected"),
        ({"graphs": 2}, {"graphs": 1}, "1 graphs expected"),
        ({"graphs": 2}, {"graphs": 3}, "3 graphs expected"),
        ({"kernels": 1}, {"kernels": 0}, "0 kernels expected"),
        ({"kernels": 1}, {"kernels": 2}, "2 kernels expected"),
        ({"n": 3, "graphs": 2, "kernels": 1}, {"n": 3, "graphs": 1, "kernels": 2}, "1 graphs expected"),
        ({}, {"n": 0}, "0 graphs and kernels together expected"),
    ],
)
def test_counts_what_a_block_compiles(right: dict[str, int], wrong: dict[str, int], message: str) -> None:
    cache_clear()
    with assert_compiles(**right) as found:
        compile_some(graphs=2, kernels=1)
    assert (found.graphs, found.kernels) == (2, 1)
    cache_clear()
    with (
        pytest.raises(AssertionError, match=f"^{message}, found 2 graphs and 1 kernels$"),
        assert_compiles(**wrong) as found,
    ):
        compile_some(graphs=2, kernels=1)
    assert (found.graphs, found.kernels) == (2, 1)


def test_what_is_there_already_does_not_count() -> None:
    compile_some(graphs=0, kernels=2)
    with assert_compiles(0):
        compile_some(graphs=0, kernels=2)


def test_an_exception_in_the_block_passes_unchanged() -> None:
    error = KeyError("of the block")

    def block() -> None:
        with assert_compiles(0):
            compile_some(graphs=1, kernels=0)
            raise error

    with pytest.raises(KeyError) as caught:
        block()
    assert caught.value is error
    assert (error.__cause__, error.__context__) == (None, None)
