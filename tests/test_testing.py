"""The test kit: it passes what is right, the README's example first, and names what is wrong."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from compiled_optim import SGD, NAdam, Optimizer, SparseAdam
from compiled_optim.declare import buffer, counter, number
from compiled_optim.testing import check

README = Path(__file__).parent.parent / "README.md"


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


@pytest.mark.parametrize("cls", [SGD, NAdam, SparseAdam], ids=lambda cls: cls.__name__)
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


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (WholeTensor, "elementwise = False"),
        (BranchesOnValue, "BranchesOnValue"),
        (HiddenState, "values"),
        (Unchecked, "rho.* was not refused"),
        (WideStep, "the same scalars"),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_names_what_is_wrong(cls: type[Optimizer], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(cls, {}, foreach=False)
