"""TensorList against the same arithmetic, tensor by tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compiled_optim._engine.values import TensorList

SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (5,), (2, 3)]
BINARY = [operator.add, operator.sub, operator.mul, operator.truediv]
METHODS = ["maximum", "minimum"]
UNARY: list[Callable[[Any], Any]] = [operator.neg, operator.methodcaller("abs")]
UNARY += [operator.methodcaller("sqrt"), operator.methodcaller("sign")]


def positive() -> list[Tensor]:
    return [torch.rand(shape, dtype=torch.float64) + 0.5 for shape in SHAPES]


def check(result: Any, expected: list[Tensor]) -> None:
    assert isinstance(result, TensorList)
    torch.testing.assert_close(list(result.tensors), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("operation", [*BINARY, operator.pow])
def test_list_with_list(operation: Callable[[Any, Any], Any]) -> None:
    a, b = positive(), positive()
    check(operation(TensorList(a), TensorList(b)), [operation(x, y) for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("operation", [*BINARY, operator.pow])
@pytest.mark.parametrize("other", [1.7, 2, torch.tensor(1.7, dtype=torch.float64)], ids=["float", "int", "0-d tensor"])
def test_list_with_scalar(operation: Callable[[Any, Any], Any], other: Any) -> None:
    a = positive()
    check(operation(TensorList(a), other), [operation(x, other) for x in a])


@pytest.mark.parametrize("operation", BINARY)
@pytest.mark.parametrize("other", [1.7, 2, torch.tensor(1.7, dtype=torch.float64)], ids=["float", "int", "0-d tensor"])
def test_scalar_with_list(operation: Callable[[Any, Any], Any], other: Any) -> None:
    a = positive()
    check(operation(other, TensorList(a)), [operation(other, x) for x in a])


@pytest.mark.parametrize("method", METHODS)
def test_maximum_and_minimum(method: str) -> None:
    a, b = positive(), positive()
    a[3][1] = b[4][0, 0] = torch.nan
    elementwise = getattr(torch, method)
    result = getattr(TensorList(a), method)(TensorList(b))
    torch.testing.assert_close(
        list(result.tensors), [elementwise(x, y) for x, y in zip(a, b, strict=True)], rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bound", [1.0, torch.tensor(1.0, dtype=torch.float64)], ids=["float", "0-d tensor"])
def test_maximum_and_minimum_with_scalar(method: str, bound: Any) -> None:
    a = positive()
    limit = torch.tensor(1.0, dtype=torch.float64)
    check(getattr(TensorList(a), method)(bound), [getattr(torch, method)(x, limit) for x in a])


@pytest.mark.parametrize("operation", UNARY, ids=["neg", "abs", "sqrt", "sign"])
def test_unary(operation: Callable[[Any], Any]) -> None:
    a = positive()
    signed = [x - 1 for x in a] if operation is not UNARY[2] else a
    check(operation(TensorList(signed)), [operation(x) for x in signed])


def test_list_of_zero_dimensional_tensors_broadcasts() -> None:
    """Scalars of step counts that only the device may read, and those of a foreach graph."""
    a, scalars = positive(), [torch.tensor(float(i), dtype=torch.float64) for i in range(len(SHAPES))]
    check(TensorList(a) * TensorList(scalars), [x * k for x, k in zip(a, scalars, strict=True)])
    check(TensorList(a) - TensorList(scalars), [x - k for x, k in zip(a, scalars, strict=True)])


def test_dtype_is_that_of_the_tensors_not_of_a_scalar_tensor() -> None:
    a = [t.float() for t in positive() if t.dim()]  # two 0-d tensors promote, in torch as here
    for result in (TensorList(a) * torch.tensor(1.5, dtype=torch.float64), TensorList(a) + 1.5, 1.5 / TensorList(a)):
        assert result.dtype == torch.float32
        assert all(t.dtype == torch.float32 for t in result.tensors)


def test_to_converts_only_where_it_must() -> None:
    a = TensorList(positive())
    assert a.to(torch.float64) is a
    narrow = a.to(torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(list(narrow.tensors), [t.bfloat16() for t in a.tensors], rtol=0, atol=0)


def test_operators_write_to_no_operand_and_copy_does() -> None:
    a, b = positive(), positive()
    before = [t.clone() for t in (*a, *b)]
    result = TensorList(a) * TensorList(b) + 1
    torch.testing.assert_close([*a, *b], before, rtol=0, atol=0)
    TensorList(a).copy_(result)
    torch.testing.assert_close(a, list(result.tensors), rtol=0, atol=0)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(RuntimeError, match="same number of tensors"):
        TensorList(positive()) + TensorList(positive()[:2])
