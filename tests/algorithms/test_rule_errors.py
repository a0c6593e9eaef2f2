"""A mistake in a user's rule: the message says which class, which name, and what there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import named

from compiled_optim import Optimizer
from compiled_optim.declare import buffer, carried, counter, flag, number


class Mine(Optimizer):
    lr: float = number(default=0.1)
    lazy: bool = flag(default=False)

    step_count = counter()
    exp_avg = buffer()

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"step_size": h.lr}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - g * k.step_size


def misspelt_state(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    s.exp_avgg = g
    return p - g * k.step_size


RULES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scalar": (
        {"update": lambda p, g, s, k, on: p - g * k.step_sise},
        AttributeError,
        "Wrong: `update` reads k.step_sise, which is not among the scalars: ['step_size']",
    ),
    "buffer": (
        {"update": lambda p, g, s, k, on: p - s.exp_avgg},
        AttributeError,
        "Wrong: `update` reads s.exp_avgg, which is not among the buffers: ['exp_avg']",
    ),
    "assigned buffer": (
        {"update": misspelt_state},
        AttributeError,
        "Wrong: `update` assigns s.exp_avgg, which is not among the buffers: ['exp_avg']",
    ),
    "option": (
        {"update": lambda p, g, s, k, on: p if on.lazy else p - g},
        AttributeError,
        "Wrong: `update` reads on.lazy, which is not among the fields declared with switch=True: ['maximize']",
    ),
    "hyperparameter": (
        {"scalars": lambda h, step: {"step_size": h.rate}},
        AttributeError,
        "Wrong: `scalars` reads h.rate, which is not among the hyperparameters: "
        "['maximize', 'foreach', 'differentiable', 'lr', 'lazy']",
    ),
    "no return": (
        {"update": lambda p, g, s, k, on: None},
        TypeError,
        "Wrong: `update` must return the new parameter, got None",
    ),
    "no dict": (
        {"scalars": lambda h, step: [h.lr]},
        TypeError,
        "Wrong: `scalars` must return a dict of numbers, got [0.1]",
    ),
    "no number": (
        {"scalars": lambda h, step: {"step_size": "0.1"}},
        TypeError,
        "Wrong: `scalars` must return a dict of numbers, got '0.1' as 'step_size'",
    ),
}


@pytest.mark.filterwarnings("ignore::compiled_optim.CompileFallbackWarning")
@pytest.mark.parametrize("options", [{}, {"differentiable": True}, {"compiled": True}], ids=named)
@pytest.mark.parametrize(("functions", "error", "message"), RULES.values(), ids=RULES)
def test_a_mistake_is_named_and_nothing_is_written(
    functions: dict[str, Any], error: type[Exception], message: str, options: dict[str, Any], lenient: None
) -> None:
    cls = type("Wrong", (Mine,), {name: staticmethod(function) for name, function in functions.items()})
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = cls([p], **options)
    with pytest.raises(error) as caught:
        optimizer.step()
    assert str(caught.value) == message
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


def test_a_name_that_scalars_carries_is_checked_too() -> None:
    def misspelt(h: Any, step: Any, s: Any) -> dict[str, Any]:
        s.ettta = 1.0
        return {"step_size": s.eta}

    cls = type("Wrong", (Mine,), {"scalars": staticmethod(misspelt), "eta": carried(initial=1.0)})
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(AttributeError, match=r"Wrong: `scalars` assigns s\.ettta, which is not among .*: \['eta'\]"):
        cls([p]).step()


@pytest.mark.parametrize("name", ["scalars", "update"])
def test_a_rule_has_both_functions(name: str) -> None:
    present = {k: staticmethod(getattr(Mine, k)) for k in {"scalars", "update"} - {name}}
    cls = type("Half", (Optimizer,), {"lr": number(default=0.1), **present})
    with pytest.raises(TypeError, match=rf"Half: a rule needs `scalars` and `update`, and \['{name}'\] is not defined"):
        cls([torch.nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (buffer(when="lazy"), r"Wrong: when of 'other' must be one of \['maximize'\], got 'lazy'"),
        (buffer(initial="rate"), r"Wrong: initial of 'other' must be one of \[.*'lr', 'lazy'\], got 'rate'"),
        (carried(initial="rate"), r"Wrong: initial of 'other' must be one of \[.*'lr', 'lazy'\], got 'rate'"),
    ],
)
def test_a_buffer_refers_to_fields_that_exist(field: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        type("Wrong", (Mine,), {"other": field})


def test_an_error_of_the_rules_own_is_left_as_it_is() -> None:
    cls = type("Other", (Mine,), {"update": staticmethod(lambda p, g, s, k, on: p - g * "x".step_sise)})
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(AttributeError, match="'str' object has no attribute 'step_sise'"):
        cls([p]).step()
