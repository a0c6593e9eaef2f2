"""What users rely on by name: signatures, rows, environment variables, warnings. The snapshot changes on purpose only.

python tests/front/test_public.py    writes it anew
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import compiled_optim
from compiled_optim.report import Row

SNAPSHOT = Path(__file__).parents[1] / "golden" / "public.json"
MODULES = {
    "compiled_optim": compiled_optim.__all__,
    "compiled_optim.functional": None,
    "compiled_optim.declare": ["number", "flag", "buffer", "carried", "counter", "mean", "batched", "of_shape"],
    "compiled_optim.lr_scheduler": None,  # all of its __all__
    "compiled_optim.swa_utils": None,
    "compiled_optim.testing": ["assert_compiles", "check"],
}


def shape(value: Any) -> Any:
    """A signature without annotations; of a class also its own public methods; of a named tuple its fields."""
    if isinstance(value, type) and issubclass(value, Warning | Exception):
        return [base.__name__ for base in value.__mro__[:-1]]
    if isinstance(value, type) and issubclass(value, tuple):
        return list(value._fields)  # type: ignore[attr-defined]
    if isinstance(value, type):
        methods = {name for cls in value.__mro__ if in_package(cls) for name, m in vars(cls).items() if callable(m)}
        return {
            "": parameters(value),
            **{n: parameters(m) for n in sorted(methods) if n[0] != "_" and (m := getattr(value, n, None))},
        }
    return parameters(value) if callable(value) else type(value).__name__


def in_package(cls: type) -> bool:
    return cls.__module__.startswith("compiled_optim")


def parameters(function: Any) -> list[str]:
    def text(p: inspect.Parameter) -> str:
        default = "" if p.default is p.empty else f" = {re.sub(' at 0x[0-9a-f]+', '', repr(p.default))}"
        return f"{p.kind.name.lower()} {p.name}{default}"

    return [text(p) for p in inspect.signature(function).parameters.values()]


def present() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module, names in MODULES.items():
        loaded = importlib.import_module(module)
        for name in sorted(loaded.__all__ if names is None else names):
            found[f"{module}.{name}"] = shape(getattr(loaded, name))
    sources = Path(compiled_optim.__file__).parent.rglob("*.py")
    variables = {v for source in sources for v in re.findall(r"\bCOMPILED_OPTIM_[A-Z_]+", source.read_text())}
    found["environment"] = sorted(variables)
    found["rows of explain"] = [f.name for f in fields(Row)]
    return found


def test_nothing_that_users_name_has_changed() -> None:
    before, now = json.loads(SNAPSHOT.read_text()), present()
    assert sorted(before) == sorted(now)
    assert {name: (before[name], now[name]) for name in before if before[name] != now[name]} == {}


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(present(), indent=1, sort_keys=True) + "\n")
