"""Recorded rules against the same rules on lists of tensors: same results, gradients untouched, few operations."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compiled_optim
from compiled_optim import Optimizer
from compiled_optim._engine.executions.program import record
from compiled_optim._engine.rule import apply
from compiled_optim._engine.values import TensorList, add_square, lerp, where
from compiled_optim.declare import buffer, number

SHAPES: list[tuple[int, ...]] = [(3,), (), (2, 5), (0,)]
BUFFERS = ("one", "two")

UNARY: list[Callable[[Any], Any]] = [
    lambda a: -a,
    lambda a: a.abs(),
    lambda a: a.abs().sqrt(),
    lambda a: a.sign(),
    lambda a: a.to(torch.float32).to(torch.float64),
]
WITH_NUMBER: list[Callable[[Any, float], Any]] = [
    lambda a, n: a + n,
    lambda a, n: a - n,
    lambda a, n: n - a,
    lambda a, n: a * n,
    lambda a, n: a / n,
    lambda a, n: n / (a.abs() + 1),
    lambda a, n: a.abs() ** n,
    lambda a, n: a.maximum(n),
    lambda a, n: a.minimum(n),
    lambda a, n: a.clamp_min(n),
    lambda a, n: a.masked_fill(a > n, n),
    lambda a, n: a * 0 + (a != n) * n,
]
BINARY: list[Callable[[Any, Any, float], Any]] = [
    lambda a, b, n: a + b,
    lambda a, b, n: a - b * n,
    lambda a, b, n: a + b * n,
    lambda a, b, n: a * n + b * n,
    lambda a, b, n: a * b,
    lambda a, b, n: a - a * b,
    lambda a, b, n: a + b * b * n,
    lambda a, b, n: a - b / (a.abs() + 1) * n,
    lambda a, b, n: b + a / (b.abs() + 1),
    lambda a, b, n: a.maximum(b),
    lambda a, b, n: b.minimum(a),
    lambda a, b, n: lerp(a, b, n),
    lambda a, b, n: add_square(a, b, n),
    lambda a, b, n: where(a > b, a, b * n),
    lambda a, b, n: a.where(b < n, b),
    lambda a, b, n: b.masked_fill(a == b, n),
]


class Subject(Optimizer):
    lr: float = number(default=0.5)

    one = buffer()
    two = buffer()


def random_rule(seed: int, length: int) -> Callable[..., Any]:
    """A rule of operations drawn by chance, on values that earlier ones may have used or not."""

    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        draw = random.Random(seed)
        values = [p, g, s.one, s.two]
        for _ in range(length):
            a, b = draw.choice(values), draw.choice(values[-3:])
            n = draw.choice([0.5, 0.25, 2.0, 1, k.lr])
            kind = draw.randrange(4)
            if kind == 0:
                values.append(draw.choice(UNARY)(b))
            elif kind == 1:
                values.append(draw.choice(WITH_NUMBER)(b, n))
            else:
                values.append(draw.choice(BINARY)(a, b, n))
        s.one, s.two = draw.choice(values), draw.choice(values)
        return values[-1]

    return update


def columns(seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, dtype=torch.float64, generator=generator) for s in SHAPES] for _ in range(4)]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**9), length=st.integers(0, 12))
def test_a_recorded_rule_does_what_it_does_on_lists(seed: int, length: int) -> None:
    whole = Subject.rule
    same = {name: getattr(whole, name) for name in ("declaration", "extras", "rounds", "name")}
    rule: Any = SimpleNamespace(elementwise=True, update=random_rule(seed, length), **same)
    on = Subject.rule.declaration.switch_type._make([False])
    given_tensors, tensors = columns(seed), columns(seed)
    p, g, *state = map(TensorList, given_tensors)
    new, new_state = apply(rule, on, p, g, dict(zip(BUFFERS, state, strict=True)), {"lr": 0.5})
    program = record(rule, on, [torch.float64] * 4, torch.device("cpu"), {"lr": 0.5})
    assert program is not None
    program.run(tensors)
    expected = [new.tensors, given_tensors[1], *(value.tensors for value in new_state.values())]
    for ours, theirs in zip(tensors, expected, strict=True):
        torch.testing.assert_close(ours, list(theirs), rtol=1e-9, atol=1e-9, equal_nan=True)


# of the foreach implementation of torch.optim, by default options
OPERATIONS = {"SGD": 1, "Adam": 7, "AdamW": 8, "Adagrad": 4, "RMSprop": 5, "Adamax": 6, "Adadelta": 11, "ASGD": 3}


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_more_operations_than_torch(name: str) -> None:
    """Each is a call for each list of tensors."""
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = getattr(compiled_optim, name)([p])
    seen = 0
    for _ in range(2):
        p.grad = torch.ones(5)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        seen = sum(e.name.startswith("aten::_foreach") for e in profile.events())
    advanced = bool(optimizer.rule.declaration.counts) + len(optimizer.rule.declaration.carried)
    assert 0 < seen - advanced <= OPERATIONS[name]


def test_temporaries_do_not_grow_with_the_parameter() -> None:
    peaks = []
    for elements in (1 << 20, 1 << 22):
        p = torch.nn.Parameter(torch.ones(elements))
        optimizer = compiled_optim.AdamW([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            optimizer.step()
        now = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        peaks.append(peak)
    assert 0 < peaks[0] == peaks[1] < 4 << 20  # the bytes of the smaller parameter; torch takes two temporaries of them


def test_a_rule_with_tensors_of_its_own_is_not_recorded() -> None:
    scale = torch.tensor([1.0, 2.0, 4.0])

    class Scaled(Optimizer):
        lr: float = number(default=0.5)

        @staticmethod
        def scalars(h: Any, step: Any) -> dict[str, Any]:
            return {"lr": h.lr}

        @staticmethod
        def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
            return p - g * k.lr * scale

    p, wrong = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(3)
    Scaled([p]).step()
    assert p.tolist() == [-0.5, -1.0, -2.0]
    wrong.grad = torch.ones(2)
    with pytest.raises(RuntimeError):
        Scaled([wrong]).step()
    assert wrong.tolist() == [0.0, 0.0]
