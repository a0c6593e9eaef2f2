"""What ``help`` and ``inspect`` show of a class: its arguments and state as declared, an example that runs."""

from __future__ import annotations

import doctest
import inspect
import pydoc
import re
import runpy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from cases import CLASSES

import compiled_optim
from compiled_optim import LBFGS, AdamW, Optimizer, explain, lr_scheduler, swa_utils
from compiled_optim.declare import Number, buffer, number
from compiled_optim.swa_utils import AveragedModel

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)


def entries(cls: type[Optimizer], section: str) -> dict[str, str]:
    """What a section of a docstring says of each name, on one line."""
    (text,) = re.findall(rf"^{section}:\n((?:    .*\n)+)", cls.__doc__ or "", re.MULTILINE)
    lines = map(str.strip, re.sub(r"\n {8}", " ", text).splitlines())
    return {re.split(r"[ :]", line)[0]: line for line in lines}


@every_class
def test_each_argument_is_explained_with_type_range_and_default(cls: type[Optimizer]) -> None:
    explained = entries(cls, "Args")
    parameters = dict(inspect.signature(cls).parameters)
    assert list(explained) == list(parameters)
    for name, parameter in parameters.items():
        text, field = explained[name], cls.rule.declaration.options.get(name)
        assert parameter.annotation is not parameter.empty
        if name == "params":
            continue
        what = text.partition("): ")[2].partition(";")[0]
        assert len(what.split()) > 1, f"{name} is not explained: {text}"
        assert f"default: {parameter.default!r}." in text
        if isinstance(field, Number):
            assert field.range == "a number" or field.range in text
            assert not field.unit or f"unit: {field.unit};" in text


@every_class
def test_each_buffer_is_explained(cls: type[Optimizer]) -> None:
    explained = entries(cls, "State")
    assert list(explained) == list(cls.rule.declaration.slots)
    for name, field in cls.rule.declaration.buffers.items():
        assert field.help in explained[name]
        assert field.when is None or f"while {field.when} is on" in explained[name]


@every_class
def test_annotations_are_types(cls: type[Optimizer]) -> None:
    annotations = {k: p.annotation for k, p in inspect.signature(cls).parameters.items()}
    assert not [k for k, annotation in annotations.items() if isinstance(annotation, str)]
    assert annotations["lr"] == float | torch.Tensor
    assert annotations["compiled"] == Literal[False, True, "multi_tensor", "foreach"]
    for value in ("False", "True", '"multi_tensor"', '"foreach"'):
        assert value in entries(cls, "Args")["compiled"]


@every_class
def test_help_hides_what_is_private(cls: type[Optimizer]) -> None:
    text = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    assert not re.findall(r"^ \|  (_(?!_).*)$", text, re.MULTILINE)
    for name in ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict", "attach"):
        assert re.search(rf"^ \|  {name}\(self", text, re.MULTILINE)


PUBLIC = {name: getattr(compiled_optim, name) for name in compiled_optim.__all__ if name != "__version__"}
PUBLIC |= {name: getattr(swa_utils, name) for name in swa_utils.__all__}
PUBLIC |= {name: getattr(lr_scheduler, name) for name in ("get_ema_decay_fn", "warmup")}


@pytest.mark.parametrize(("name", "subject"), PUBLIC.items(), ids=PUBLIC)
def test_examples_run(name: str, subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "AdamW":  # the others would compile the same way
        monkeypatch.setenv("COMPILED_OPTIM_DISABLE", "1")
    tests = doctest.DocTestFinder(recurse=False).find(subject, name)
    assert sum(doctest.DocTestRunner().run(test).failed for test in tests) == 0
    wanted = isinstance(subject, type(explain)) and not subject.__module__.startswith(swa_utils.__name__)
    wanted = wanted or subject in (*CLASSES, Optimizer, LBFGS, AveragedModel)
    assert any(test.examples for test in tests) or not wanted


class Documented(Optimizer):
    """A user's rule.

    Args:
        lr: explained by hand.
    """

    lr: float = number(default=0.5, high=1)


class Bare(Optimizer):
    lr: float = number(default=0.5, high=1, unit="parameter", help="how far")
    other: Any = number(default=(1.0, 2.0), above=0)
    unknown: NotImported = number(default=0.0)  # type: ignore[name-defined]  # noqa: F821

    average = buffer()


def test_a_users_class_is_explained_too() -> None:
    explained = entries(Bare, "Args")
    assert explained["lr"] == "lr (float): how far; unit: parameter; at most 1; default: 0.5."
    assert explained["other"] == "other (Any): each above 0; default: (1.0, 2.0)."
    assert explained["unknown"] == "unknown (NotImported): default: 0.0."
    assert entries(Bare, "State") == {"average": "average: shaped like its parameter."}


def test_a_section_that_is_written_by_hand_stays_as_it_is() -> None:
    text = inspect.getdoc(Documented) or ""
    assert text.startswith("A user's rule.\n\nArgs:\n    lr: explained by hand.\n\nExample:\n    >>> import torch\n")


def test_a_subclass_that_declares_nothing_inherits_the_documentation() -> None:
    class Plain(AdamW):
        pass

    assert inspect.getdoc(Plain) == inspect.getdoc(AdamW)


def test_the_program_that_type_checkers_check_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[1] / "typing" / "user_script.py"))["main"]()
    assert "eager" in capsys.readouterr().out
