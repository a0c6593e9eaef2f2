"""The cost model: bytes and operations of a step, against what Inductor's kernels take and what rules write down."""

from __future__ import annotations

from typing import Any

import pytest
import sympy as sp
import torch
from beside_torch import parameters, set_gradients

import compiled_optim
from compiled_optim import AdamW, Optimizer, explain, graphs
from compiled_optim._engine.kernels import cost, registry
from compiled_optim._engine.kernels.backends import cpu
from compiled_optim._engine.kernels.trace import Signature, trace
from compiled_optim.declare import buffer, number

SIGNATURES = dict(graphs.signatures())


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_model_counts_what_the_kernel_takes(name: str) -> None:
    signature = SIGNATURES[name]
    traced = trace(signature)
    found = cost.of_traced(traced)
    assert found.bytes_per_element == registry.bytes_per_element(signature, cpu.lower(traced, portable=True))
    param, grad, *buffers = (dtype.itemsize for dtype in signature.flat_dtypes)
    assert found.bytes_per_element == found.minimum == 2 * param + grad + 2 * sum(buffers)


class Lazy(Optimizer):
    """Never reads its old state, and half of what it writes is in another dtype."""

    lr: float = number(default=0.1, low=0)
    last = buffer()

    scalars = staticmethod(lambda h, step: {"lr": h.lr, "twice": 2 * h.lr})

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        s.last = (g * g).sqrt()
        return p - g * (k.lr + k.twice) - s.last / 3


def signature_of(cls: Any, *dtypes: torch.dtype) -> Signature:
    choice = cls.rule.declaration.read(cls.rule.declaration.check({}))
    return Signature(cls.rule, choice.switches, dtypes, ("last",), ("lr", "twice"))


def test_bytes_and_operations_are_those_of_the_rule() -> None:
    found = cost.of(signature_of(Lazy, torch.float64, torch.float32))
    assert found.read == {"param": 8, "grad": 8, "last": 0}
    assert found.written == {"param": 8, "grad": 0, "last": 4}
    assert (found.bytes_per_element, found.minimum) == (28, 32)
    assert found.operations == {"add": 2, "convert": 1, "div": 1, "mul": 2, "sqrt": 1}
    assert found.tensor_operations == {"add": 1}


def test_expressions_in_elements_and_tensors() -> None:
    found = cost.of(signature_of(Lazy, torch.float32, torch.float32))
    n, tensors, bandwidth = sp.symbols("n T B", positive=True)
    assert found.bytes.coeff(n) == 16
    assert found.bytes.coeff(tensors) == found.per_tensor > 0
    assert sp.simplify(found.seconds * bandwidth - found.bytes) == 0
    add, div, mul, sqrt = sp.symbols("add div mul sqrt", positive=True)
    assert sp.expand(found.arithmetic - n * (2 * add + div + 2 * mul + sqrt) - tensors * add) == 0
    assert found.at(found.arithmetic, elements=100, tensors=3) == 603
    assert found.at(found.seconds, 10**9, 0, bandwidth=1.6e10) == 1


# ---- explain


def test_explain_predicts_at_a_bandwidth() -> None:
    params = parameters()
    optimizer = AdamW(params, compiled=True)
    set_gradients(params)
    optimizer.step()
    (plain,), (row,) = explain(optimizer), explain(optimizer, bandwidth=0.5)
    assert (plain.bytes, plain.operations, plain.milliseconds) == (None, None, None)
    assert row.bytes is not None
    assert row.bytes >= row.elements * row.bytes_per_element
    assert row.operations is not None
    assert row.operations > 10 * row.elements
    assert row.milliseconds == pytest.approx(row.bytes / 0.5e9 * 1e3)
    costs = ["bytes", "operations", "milliseconds"]
    assert str(explain(optimizer, bandwidth=0.5)).splitlines()[0].split()[-3:] == costs
    assert not set(costs) & set(str(explain(optimizer)).splitlines()[0].split())


def test_explain_predicts_nothing_of_eager_steps() -> None:
    (row,) = explain(AdamW(parameters()), bandwidth=20)
    assert (row.bytes, row.operations, row.milliseconds) == (None, None, None)


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan")])
def test_a_bandwidth_is_positive(bandwidth: float) -> None:
    with pytest.raises(ValueError, match="bandwidth must be above 0 GB/s, got"):
        compiled_optim.explain(AdamW(parameters()), bandwidth=bandwidth)
