"""What a user's function refers to: every change of it is seen, or it is known that it would not be."""

from __future__ import annotations

import functools
import math
import os
import random
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compiled_optim import AdamW, algorithms
from compiled_optim._engine.kernels.references import UnknownReferenceError, is_own, references

FACTOR = 0.5
CONFIG = types.ModuleType("config")
NESTED = types.ModuleType("nested")
CONFIG.nested = NESTED  # type: ignore[attr-defined]


class Settings:
    factor = 0.5

    @classmethod
    def of_class(cls, x: Any) -> Any:
        return x * cls.factor

    @staticmethod
    def of_none(x: Any) -> Any:
        return x * FACTOR


class Base:
    factor = 0.5

    def scale(self, x: Any) -> Any:
        return x * self.factor


class Slotted:
    __slots__ = ("factor",)


class Scale(Base):
    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self, x: Any) -> Any:
        return self.scale(x) + self.offset

    @property
    def computed(self) -> float:
        return FACTOR


def helper(x: Any) -> Any:
    return x * FACTOR


def recursive(x: Any, n: int = 3) -> Any:
    return x if n == 0 else recursive(x * FACTOR, n - 1)


def set_to(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


def seen_changes() -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Functions, and a change of what each refers to."""
    here = sys.modules[__name__]
    for owner in (here, CONFIG, NESTED):
        owner.FACTOR = 0.5  # type: ignore[attr-defined]
    Settings.factor = Base.factor = 0.5
    by_global = set_to(here, "FACTOR", 0.25)
    scale, slotted, namespace = Scale(), Slotted(), types.SimpleNamespace(factor=0.5)
    slotted.factor = 0.5  # type: ignore[attr-defined]
    values, table, names, several = [0.5], {"factor": [0.5]}, {"a", "b"}, [abs, helper]
    factor = 0.5

    def enclosing(x: Any) -> Any:
        return x * factor

    def assign() -> None:
        nonlocal factor
        factor = 0.25

    def by_default(x: Any, factor: Any = values) -> Any:
        return x * factor[0]

    def by_keyword(x: Any, *, factor: float = 0.5) -> Any:
        return x * factor

    @torch.no_grad()
    def decorated(x: Any) -> Any:
        return x * values[0]

    def comprehension(x: Any) -> Any:
        return sum(x * f for f in values) + (lambda: x * values[0])()

    return {
        "a global": (lambda x: x * FACTOR, by_global),
        "a global's type": (lambda x: x * FACTOR, set_to(here, "FACTOR", torch.float32)),
        "a sign of zero": (lambda x: x * namespace.factor, set_to(namespace, "factor", -0.0)),
        "a global that is defined later": (lambda x: x * LATER, set_to(here, "LATER", 1.0)),  # type: ignore[name-defined]  # noqa: F821
        "an enclosed variable": (enclosing, assign),
        "a function": (lambda x: helper(x), by_global),
        "a recursive function": (recursive, by_global),
        "a default": (recursive, set_to(recursive, "__defaults__", (4,))),
        "a list default": (by_default, lambda: values.append(1.0)),
        "a keyword default": (by_keyword, set_to(by_keyword, "__kwdefaults__", {"factor": 0.25})),
        "code": (lambda x: helper(x), set_to(helper, "__code__", (lambda x: x).__code__)),
        "a module": (lambda x: x * CONFIG.nested.FACTOR, set_to(NESTED, "FACTOR", 0.25)),
        "a class": (lambda x: x * Settings.factor, set_to(Settings, "factor", 0.25)),
        "a class method": (lambda x: Settings.of_class(x), set_to(Settings, "factor", 0.25)),
        "a static method": (lambda x: Settings.of_none(x), by_global),
        "an object": (lambda x: x * namespace.factor, set_to(namespace, "factor", 0.25)),
        "a slot": (lambda x: x * slotted.factor, set_to(slotted, "factor", 0.25)),  # type: ignore[attr-defined]
        "a callable object": (scale.__call__, set_to(scale, "offset", 1.0)),
        "an object's class": (scale.__call__, set_to(Base, "factor", 0.25)),
        "a bound method": (scale.scale, set_to(scale, "factor", 0.25)),
        "a method": (lambda x: scale.scale(x), set_to(scale, "factor", 0.25)),
        "a base class's method": (scale.__call__, set_to(Base, "scale", lambda self, x: x)),
        "a list": (lambda x: x * values[0], lambda: values.__setitem__(0, 0.25)),
        "a list in a dict": (lambda x: x * table["factor"][0], lambda: table["factor"].append(1.0)),
        "a set": (lambda x: x if "c" in names else -x, lambda: names.add("c")),
        "functions in a list": (lambda x: several[1](x), by_global),
        "a partial": (functools.partial(by_keyword, factor=values), lambda: values.append(1.0)),
        "a decorated function": (decorated, lambda: values.append(1.0)),
        "a comprehension": (comprehension, lambda: values.append(1.0)),
        "a library's function": (lambda x: CONFIG.nested.FACTOR(x), set_to(NESTED, "FACTOR", torch.exp)),
    }


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the changes change is set back."""
    monkeypatch.setattr(helper, "__code__", helper.__code__)
    monkeypatch.setattr(recursive, "__defaults__", recursive.__defaults__)
    monkeypatch.setattr(Base, "scale", Base.scale)
    monkeypatch.setitem(globals(), "LATER", 0)
    del globals()["LATER"]


@pytest.mark.parametrize("kind", seen_changes())
def test_a_change_is_seen(kind: str) -> None:
    function, change = seen_changes()[kind]
    before = references(function)
    assert references(function) == before
    change()
    assert references(function) != before


def assigns(x: Any) -> Any:
    global FACTOR
    FACTOR = 1.0
    return x


def imports(x: Any) -> Any:
    import config_of_the_user  # type: ignore[import-not-found]

    return x * config_of_the_user.factor


def unseen_changes() -> dict[str, Any]:
    scale, count, tensor = Scale(), 0, torch.tensor(0.5)

    def counts(x: Any) -> Any:
        nonlocal count
        count += 1
        return x

    class Lazy:
        def __getattr__(self, name: str) -> float:
            return FACTOR

    lazy, computed = Lazy(), types.ModuleType("computed")
    computed.__getattr__ = lambda name: FACTOR  # type: ignore[method-assign]
    return {
        "tensor": lambda x: x * tensor,
        "scale": lambda x: x * getattr(scale, "factor"),  # noqa: B009
        "lazy": lambda x: x * lazy.factor,
        "computed.factor": lambda x: x * computed.factor,
        "scale.computed": lambda x: x * scale.computed,
        "vars": lambda x: x * vars(Settings)["factor"],
        "globals": lambda x: x * globals()["FACTOR"],
        "random.random": lambda x: x * random.random(),
        "torch.rand_like": lambda x: x + torch.rand_like(x),
        "torch.get_default_dtype": lambda x: x.to(torch.get_default_dtype()),
        "os.environ": lambda x: x * len(os.environ),
        "table": (lambda table: lambda x: x * table[0])([*range(100)]),
        "count": counts,
        "assigns": assigns,
        "imports": imports,
    }


@pytest.mark.parametrize("name", unseen_changes())
def test_what_may_change_unseen_is_named(name: str) -> None:
    with pytest.raises(UnknownReferenceError, match=name.replace(".", r"\.")):
        references(unseen_changes()[name])


def test_torch_and_python_are_taken_by_name() -> None:
    assert references(lambda x: torch.nn.functional.relu(x) * math.sqrt(math.pi) * min(2, 3) + torch.Tensor.exp(x))


def test_code_is_what_counts_and_not_its_place() -> None:
    source = "def f(x):\n    return x * {0}"
    found = []
    for text in (source.format(2), "\n\n" + source.format(2), source.format(2.0)):
        namespace: dict[str, Any] = {}
        exec(text, namespace)
        found.append(references(namespace["f"]))
    assert found[0] == found[1] != found[2]


def test_the_same_in_every_process() -> None:
    code = """
from compiled_optim._engine.kernels.references import references
names = {"a", "b", "c", "d"}
print(references(lambda x: x if x in names or x in {"e", "f", "g"} else None))
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=1200,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("name", algorithms.__all__)
def test_what_the_packages_rules_refer_to_is_known(name: str) -> None:
    """Or their kernels would not be kept on disk."""
    assert references(getattr(algorithms, name).update)


def test_only_rules_of_the_package_are_its_own() -> None:
    class Mine(AdamW):
        update = staticmethod(lambda p, g, s, k, on: p)  # type: ignore[assignment]

    assert is_own(AdamW.update)
    assert not is_own(Mine.update)
