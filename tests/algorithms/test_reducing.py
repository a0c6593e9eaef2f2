"""Adafactor and Muon where what they reduce is special: empty, not finite, of another dtype, of another shape."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from beside_torch import Lockstep, parameter, tensors
from frozen import through_a_file

from compiled_optim import Adafactor, Muon


def beside(name: str, initial: list[torch.Tensor], **options: Any) -> Lockstep:
    stock, ours = getattr(torch.optim, name), {"Adafactor": Adafactor, "Muon": Muon}[name]
    return Lockstep(lambda params: stock(params, **options), lambda params: ours(params, **options), initial)


@pytest.mark.parametrize("where", ["parameter", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_adafactor_of_what_is_not_finite(shape: tuple[int, ...], value: float, where: str) -> None:
    """The RMS of it is no bound where it is NaN: torch compares in Python."""
    (initial,), (grad,) = tensors([shape]), tensors([shape])
    (initial if where == "parameter" else grad).view(-1)[1] = value
    run = beside("Adafactor", [initial])
    for _ in range(2):
        run.give([grad])
        run.step_as_is()
        run.compare()


def test_adafactor_bounds_by_the_eps_of_each_dtype() -> None:
    """In a param group of several; torch takes that of the first for all."""
    values = [torch.full((3,), 0.5, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    params, alone = ([parameter(v) for v in values] for _ in range(2))
    optimizers = Adafactor(params), *(torch.optim.Adafactor([p]) for p in alone)
    for p in (*params, *alone):
        p.grad = torch.full_like(p, 1e-6)  # between both
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("options", [{}, {"adjust_lr_fn": "match_rms_adamw"}, {"adjust_lr_fn": "spectral_unclamped"}])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_an_empty_matrix_is_no_error(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    for cls, given in ((Muon, options), (Adafactor, {})):
        empty, p, alone = (parameter(t) for t in (torch.ones(shape), torch.eye(3, 4), torch.eye(3, 4)))
        for params in ([empty, p], [alone]):
            for each in params:
                each.grad = torch.ones_like(each)
            cls(params, **given).step()
        assert torch.equal(p, alone)


def test_muon_keeps_the_momentum_of_bfloat16() -> None:
    """torch divided it in place by its norm until 2.13, without nesterov."""
    p = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    optimizer = Muon([p], nesterov=False, momentum=0.5)
    p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full_like(p, 1.5))


@pytest.mark.parametrize("scale", [1.0, 1e-12])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 7), (7, 1)])
@pytest.mark.parametrize("name", [None, "original", "match_rms_adamw", "spectral_unclamped"])
def test_muon_follows_the_shape(name: str | None, shape: tuple[int, ...], scale: float) -> None:
    """Also of gradients whose norm is below eps."""
    rows, columns = shape
    ratio = {
        "match_rms_adamw": 0.2 * math.sqrt(max(shape)),
        "spectral_unclamped": math.sqrt(rows / columns),
    }.get(name or "", math.sqrt(max(1, rows / columns)))
    initial, grad = tensors([shape, shape])
    run = beside("Muon", [initial], lr=0.1 * ratio, weight_decay=0.0)
    by_shape = parameter(initial)
    optimizer = Muon([by_shape], lr=0.1, weight_decay=0.0, adjust_lr_fn=name)
    original = math.sqrt(max(1, rows / columns))  # which torch of every version has
    run.both(lambda o, _: o.param_groups[0].update(lr=0.1 * ratio / original))
    run.give([grad * scale])
    by_shape.grad = grad * scale
    run.step_as_is()
    optimizer.step()
    run.compare(1e-10)
    torch.testing.assert_close(by_shape, run.params[0][0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ns_steps": 2.5}, r"ns_steps must be an integer, at least 0 and below 100, got 2\.5"),
        ({"ns_steps": 100}, "ns_steps must be an integer, at least 0 and below 100, got 100"),
        ({"ns_coefficients": (1.0, 2.0)}, r"ns_coefficients must have 3 values, got \(1\.0, 2\.0\)"),
        ({"ns_coefficients": (1.0, "x", 2.0)}, r"ns_coefficients\[1\] must be a number, got 'x'"),
        ({"adjust_lr_fn": "none"}, "adjust_lr_fn must be None or one of .*, got 'none'"),
    ],
)
def test_muon_names_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"Muon: {message}"):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", 1e308), ("ns_steps", 100), ("ns_steps", 1e308), ("ns_steps", 2.5), ("adjust_lr_fn", "none")],
)
def test_muon_refuses_what_a_param_group_comes_to_hold(name: str, value: Any) -> None:
    """Before it writes anything."""
    params = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Muon([{"params": [p]} for p in params])
    for p in params:
        p.grad = torch.eye(2)
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=f"Muon: .*{name} must .*{re.escape(repr(value))}"):
        optimizer.step()
    assert all(torch.equal(p, torch.ones(2, 2)) for p in params)
    assert not optimizer.state


def test_muon_names_the_parameter_that_is_no_matrix() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(
        ValueError, match=r"Muon: params must be matrices, got one of shape \(2,\) at index 1 of param group 0"
    ):
        Muon([matrix, vector])
    optimizer = Muon([matrix])
    with pytest.raises(ValueError, match=r"got one of shape \(2,\) at index 0 of param group 1"):
        optimizer.add_param_group({"params": [vector]})
    assert len(optimizer.param_groups) == 1
    other = torch.nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [other]})
    other.data = torch.ones(2)
    matrix.grad, other.grad = torch.ones(2, 2), torch.ones(2)
    with pytest.raises(ValueError, match=r"got one of shape \(2,\) at index 0 of param group 1"):
        optimizer.step()
    assert torch.equal(matrix, torch.ones(2, 2))
    assert not optimizer.state


@pytest.mark.parametrize("eps", [(None, 1e-3), (1e-4, 0.1)])
def test_adafactor_with_and_without_an_eps_travels(eps: tuple[float | None, float]) -> None:
    run = beside("Adafactor", tensors([(3, 4), (5,)]), eps=eps)
    run.step(2)
    saved = [through_a_file(optimizer.state_dict()) for optimizer in run.optimizers]
    for optimizer, state in zip(run.optimizers, saved[::-1], strict=True):
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["eps"] == eps
    run.step(2)
    run.compare()
