"""What a class declares is what torch.optim offers: constructor, checks, defaults."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import ALL, CLASSES, IDS, accepted, named, numbers_of, oracle, sample

from compiled_optim import AdamW, Optimizer
from compiled_optim._engine.one_pass import ARGUMENTS
from compiled_optim.algorithms import SGD, Adam
from compiled_optim.declare import Number

NUMBERS = [(cls, name, field) for cls in CLASSES for name, field in numbers_of(cls).items()]
TUPLES = [(cls, name, field) for cls, name, field in NUMBERS if isinstance(field.default, tuple)]
# What torch takes and we refuse: it checks these of ASGD since 2.15, and those of Muon in the first step or not at all.
LATER = {("ASGD", "lambd"), ("ASGD", "alpha"), ("Muon", "ns_steps")}
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)


def ids(cases: list[tuple[type[Optimizer], str, Number]]) -> list[str]:
    return [f"{cls.__name__}-{name}" for cls, name, _ in cases]


def outside(field: Number) -> list[float]:
    """Values on the wrong side of each bound, or on one that is excluded."""
    values = [bound - 0.5 for bound in (field.low, field.above) if bound is not None]
    values += [bound + 1.0 for bound in (field.high, field.below) if bound is not None]
    return values + [bound for bound in (field.above, field.below) if bound is not None]


BOUNDED = [(cls, name, field) for cls, name, field in NUMBERS if outside(field)]


def parameter(*shape: int, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*(shape or (3, 4)), dtype=dtype))


def test_one_class_for_each_declaration() -> None:
    assert CLASSES
    assert {cls.__name__ for cls in CLASSES} <= set(dir(torch.optim))


@every_class
def test_signature_is_that_of_torch_plus_compiled(cls: type[Optimizer]) -> None:
    def plain(function: Any) -> list[inspect.Parameter]:
        parameters = inspect.signature(function).parameters.values()
        return [p.replace(annotation=inspect.Parameter.empty) for p in parameters]

    ours, stock = plain(cls.__init__), plain(oracle(cls).__init__)
    around = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=d) for name, d in ARGUMENTS.items()]
    compiled = inspect.Parameter("compiled", inspect.Parameter.KEYWORD_ONLY, default=False)
    own = len(around) + 1
    assert ours[-own:] == [compiled, *around]
    # signatures compare positional arguments in their order, and keyword-only ones as a set
    assert inspect.Signature(ours[:-own]) == inspect.Signature(stock)
    assert list(inspect.signature(cls).parameters)[-own] == "compiled"


@pytest.mark.parametrize(("cls", "options"), ALL, ids=IDS)
def test_defaults_groups_and_repr_are_those_of_torch(cls: type[Optimizer], options: dict[str, Any]) -> None:
    p = parameter()
    ours, stock = cls([p], **options), oracle(cls)([p], **options)
    assert ours.defaults == stock.defaults
    assert {k: type(v) for k, v in ours.defaults.items()} == {k: type(v) for k, v in stock.defaults.items()}
    assert ours.param_groups == stock.param_groups
    assert repr(ours) == repr(stock)
    assert isinstance(ours, torch.optim.Optimizer)
    assert type(ours).__name__ == type(stock).__name__
    torch.testing.assert_close(ours.state_dict()["state"], stock.state_dict()["state"], rtol=0, atol=0)
    assert bool(ours.state) == cls.state_at_construction


@every_class
def test_arguments_are_bound_as_python_binds_them(cls: type[Optimizer]) -> None:
    p = parameter()
    with pytest.raises(TypeError, match="params"):
        cls()
    with pytest.raises(TypeError, match="no_such_option"):
        cls([p], no_such_option=1)
    with pytest.raises(TypeError, match="multiple values"):
        cls([p], 0.1, lr=0.1)
    positional = [n for n, v in inspect.signature(cls).parameters.items() if v.kind is v.POSITIONAL_OR_KEYWORD][1:]
    values = [cls.rule.declaration.options[n].default for n in positional]
    assert cls([p], *values).defaults == cls([p]).defaults
    with pytest.raises(TypeError, match="positional"):
        cls([p], *values, True)


def refused(error: type[Exception], cls: type[Optimizer], option: str, value: Any, *words: str) -> None:
    with pytest.raises(error) as caught:
        cls([parameter()], **{option: value})
    message = str(caught.value)
    assert message.startswith(f"{cls.__name__}: ")
    assert re.search(rf"\b{option.removesuffix('s')}", message), message
    for word in words:
        assert word in message


def spread(field: Number, bad: Any) -> list[Any]:
    """The values of an option that are ``bad`` in one place."""
    if not isinstance(field.default, tuple):
        return [bad]
    places = [i for i in range(len(field.default)) if bad is not None or not field.takes_none(i)]
    return [tuple(bad if i == j else d for j, d in enumerate(field.default)) for i in places]


@pytest.mark.parametrize(("cls", "name", "field"), BOUNDED, ids=ids(BOUNDED))
def test_values_out_of_range_are_refused(cls: type[Optimizer], name: str, field: Number) -> None:
    for bad in (*outside(field), float("nan"), np.float64(outside(field)[0])):
        for whole in spread(field, bad):
            refused(ValueError, cls, name, whole, repr(bad), field.range)
    for bound in (field.low, field.above, field.high, field.below):
        assert bound is None or f" {bound:g}" in field.range


@pytest.mark.parametrize(("cls", "name", "field"), BOUNDED, ids=ids(BOUNDED))
def test_bounds_are_those_of_torch(cls: type[Optimizer], name: str, field: Number) -> None:
    """Also whether a bound is itself allowed."""
    bounds = [bound for bound in (field.low, field.above, field.high, field.below) if bound is not None]
    for value in (*outside(field), *bounds):
        for whole in spread(field, float(value)):
            taken = accepted(cls, {name: whole})
            if (cls.__name__, name) in LATER and taken:
                continue
            assert taken == field.admits(value)


@pytest.mark.parametrize(("cls", "name", "field"), NUMBERS, ids=ids(NUMBERS))
def test_what_is_no_number_is_refused(cls: type[Optimizer], name: str, field: Number) -> None:
    for value in ("0.1", None, 1j, [0.1]):
        for whole in spread(field, value):
            refused(TypeError, cls, name, whole, repr(value), field.range)


@pytest.mark.parametrize(("cls", "name", "field"), NUMBERS, ids=ids(NUMBERS))
def test_tensors_of_another_size_are_refused(cls: type[Optimizer], name: str, field: Number) -> None:
    pair = torch.tensor([0.1, 0.2])
    if isinstance(field.default, tuple):
        whole = tuple(pair for _ in field.default)
        refused(ValueError, cls, name, whole, "(2,)")
    else:
        refused(ValueError, cls, name, pair, "(2,)")
        refused(ValueError, cls, name, torch.tensor([]), "(0,)")


@pytest.mark.parametrize(("cls", "name", "field"), TUPLES, ids=ids(TUPLES))
def test_tuples_have_one_length_and_one_kind(cls: type[Optimizer], name: str, field: Number) -> None:
    n = len(field.default)
    for value in (field.default[:-1], (*field.default, 0.5), ()):
        refused(ValueError, cls, name, value, repr(value), f"{n} values")
    mixed = (torch.tensor(0.5), *field.default[1:])
    refused(ValueError, cls, name, mixed, "all floats or all tensors")
    for value in (0.9, None, torch.tensor(0.9)):
        refused(TypeError, cls, name, value, f"{n} values")


@pytest.mark.parametrize(("cls", "name", "field"), BOUNDED, ids=ids(BOUNDED))
def test_tensors_have_the_same_range(cls: type[Optimizer], name: str, field: Number) -> None:
    for bad in (*outside(field), float("nan")):
        tensors: Any = torch.tensor(bad)
        if isinstance(field.default, tuple):
            tensors = tuple(torch.tensor(bad) for _ in field.default)
        refused(ValueError, cls, name, tensors, field.range)


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0}, {"momentum": 0.9, "dampening": 0.1}, {"momentum": 0.0, "dampening": 0.5}],
    ids=named,
)
def test_nesterov_needs_momentum_and_no_dampening(options: dict[str, Any]) -> None:
    refused(ValueError, SGD, "nesterov", True, "momentum above 0", "dampening 0")
    with pytest.raises(ValueError, match=r"SGD: nesterov=True needs momentum") as caught:
        SGD([parameter()], nesterov=True, **options)
    assert f"momentum={options['momentum']!r}" in str(caught.value)


@every_class
def test_compiled_has_four_values(cls: type[Optimizer]) -> None:
    for value in ("x", "True", "", None, 2):
        with pytest.raises(ValueError, match="compiled must be False, True, 'multi_tensor' or 'foreach'") as caught:
            cls([parameter()], compiled=value)
        assert repr(value) in str(caught.value)


EXCLUDING = [
    {"fused": True, "foreach": True},
    {"compiled": True, "differentiable": True},
    {"compiled": "foreach", "differentiable": True},
    {"fused": True, "differentiable": True},
]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (cls, options)
        for cls in CLASSES
        for options in EXCLUDING
        if set(options) <= set(inspect.signature(cls).parameters)
    ],
    ids=lambda v: named(v) if isinstance(v, dict) else v.__name__,
)
def test_options_that_exclude_each_other(cls: type[Optimizer], options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError) as caught:
        cls([parameter()], **options)
    for name, value in options.items():
        assert f"{name}={value!r}" in str(caught.value)


def of_type(scalar: Any, cls: type[Optimizer], name: str, field: Number) -> Any:
    """A value of this scalar type that torch accepts, if there is one."""
    first = sample(name, field)
    others = [(n,) * len(first) if isinstance(first, tuple) else n for n in (0, 1)]
    values = [tuple(map(scalar, v)) if isinstance(v, tuple) else scalar(v) for v in (first, *others)]
    return next((value for value in values if accepted(cls, {name: value})), None)


@pytest.mark.parametrize(("cls", "name", "field"), NUMBERS, ids=ids(NUMBERS))
def test_numpy_scalars_become_plain_python(cls: type[Optimizer], name: str, field: Number) -> None:
    values = [(kind, of_type(kind, cls, name, field)) for kind in (np.float64, np.float32, np.int64)]
    for kind, whole in values:
        if whole is None:
            continue
        p, q = parameter(), parameter()
        optimizer = cls([{"params": [p]}, {"params": [q], name: whole}], **{name: whole})
        optimizer.add_param_group({"params": [parameter()], name: whole})
        given = whole if isinstance(whole, tuple) else (whole,)
        for read in (optimizer.defaults[name], *(group[name] for group in optimizer.param_groups)):
            parts = read if isinstance(whole, tuple) else (read,)
            assert [(type(v), v) for v in parts] == [(int if kind is np.int64 else float, v) for v in given]


def test_numpy_bools_become_plain_python() -> None:
    optimizer = Adam([parameter()], amsgrad=np.bool_(True), maximize=np.bool_(False))
    assert optimizer.defaults["amsgrad"] is True
    assert optimizer.defaults["maximize"] is False


def test_a_list_of_betas_becomes_a_tuple_and_tensors_become_0d() -> None:
    assert Adam([parameter()], betas=[0.8, 0.9]).defaults["betas"] == (0.8, 0.9)
    betas = Adam([parameter()], betas=(torch.tensor([0.8]), torch.tensor([0.9]))).defaults["betas"]
    assert [b.dim() for b in betas] == [0, 0]


def test_the_tensor_learning_rate_given_is_the_one_kept() -> None:
    lr = torch.tensor(0.1)
    optimizer = AdamW([parameter()], lr=lr)
    assert optimizer.param_groups[0]["lr"] is lr
    assert optimizer.defaults["lr"] is lr


def test_option_sets_hold_more_than_the_defaults() -> None:
    assert all(sum(c is cls for c, _ in ALL) > 1 for cls in CLASSES)
