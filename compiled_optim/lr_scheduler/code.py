"""A sympy expression in the step ``t`` as code: of Python's numbers, and of tensors."""

from __future__ import annotations

import builtins
import functools
import math
from collections.abc import Callable
from typing import Any

import sympy as sp  # type: ignore[import-untyped]
import torch
from sympy.printing.pycode import PythonCodePrinter  # type: ignore[import-untyped]
from torch import Tensor

from compiled_optim._engine.values import where

Form = tuple[sp.Expr, dict[str, Any]]  # an expression, and the values of its symbols other than t


def parameters(names: str) -> Any:
    """The symbols of these names."""
    return sp.symbols(names, real=True)


t, base_lr = sp.Symbol("t", nonnegative=True), parameters("base_lr")


class _HostPrinter(PythonCodePrinter):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__({"fully_qualified_modules": False})

    def _print_Float(self, expr: sp.Expr) -> str:
        return repr(float(expr))  # sympy writes 15 digits

    def _print_Mul(self, expr: sp.Expr) -> str:
        # sympy writes t/49 as (1/49)*t, of which the floor at t = 49 is 0
        numerator, denominator = sp.fraction(expr, exact=True)
        if denominator == 1:
            return str(super()._print_Mul(expr))
        return self.quotient(self._print(numerator), self._print(denominator))

    def quotient(self, numerator: str, denominator: str) -> str:
        return f"({numerator})/({denominator})"


class _TensorPrinter(_HostPrinter):
    def quotient(self, numerator: str, denominator: str) -> str:
        return f"divide({numerator}, {denominator})"

    def _print_Piecewise(self, expr: sp.Expr) -> str:
        code = "nan"
        for value, condition in reversed(expr.args):
            value = self._print(value)
            code = value if condition == sp.true else f"where({self._print(condition)}, {value}, {code})"
        return code

    def _print_And(self, expr: sp.Expr, operator: str = " & ") -> str:
        return "(" + operator.join(f"({self._print(part)})" for part in expr.args) + ")"

    def _print_Or(self, expr: sp.Expr) -> str:
        return self._print_And(expr, " | ")

    def _print_Not(self, expr: sp.Expr) -> str:
        return f"~({self._print(expr.args[0])})"

    def _print_sign(self, expr: sp.Expr) -> str:
        return f"sign({self._print(expr.args[0])})"


def _divide(a: Any, b: Any) -> Any:
    # CUDA multiplies by the reciprocal of a number, and rounds t/49 as sympy's text would
    return a / torch.full_like(a, b) if isinstance(a, Tensor) and not isinstance(b, Tensor) else a / b


def _elementwise(name: str) -> Callable[[Any], Any]:
    return lambda x: getattr(torch if isinstance(x, Tensor) else math, name)(x)


# floats, not Python's integers: a power of those may have more digits than there is time and memory for
_HOST_CODE = vars(math) | {"floor": lambda x: float(math.floor(x)), "ceil": lambda x: float(math.ceil(x))}


def _least(*values: Any) -> Any:
    return functools.reduce(lambda a, b: where(a < b, a, b), values)


def _greatest(*values: Any) -> Any:
    return functools.reduce(lambda a, b: where(a > b, a, b), values)


_FUNCTIONS = "sin cos tan asin acos atan sinh cosh tanh exp log sqrt floor ceil erf"
_TENSOR_CODE = {
    **{name: _elementwise(name) for name in _FUNCTIONS.split()},
    "divide": _divide,
    "where": where,
    "sign": torch.sign,
    "min": _least,
    "max": _greatest,
    **{name: getattr(math, name) for name in ("pi", "e", "inf", "nan")},
}


@functools.lru_cache(maxsize=1024)
def compiled(expression: sp.Expr, of_tensors: bool = False) -> tuple[tuple[str, ...], Callable[..., Any]]:
    """The names of the symbols other than ``t``, and the function of ``t`` and their values, in that order.

    Raises:
        TypeError: where a part of the expression has no counterpart in Python's ``math``, or in torch.
    """
    symbols = sorted(expression.free_symbols - {t}, key=str)
    printer = _TensorPrinter() if of_tensors else _HostPrinter()
    known = _TENSOR_CODE if of_tensors else _HOST_CODE
    try:
        function = sp.lambdify([t, *symbols], expression, modules=[known], printer=printer, cse=of_tensors)
    except NotImplementedError as error:
        raise TypeError(f"{expression} has no counterpart in Python: {error}") from error
    unknown = set(function.__code__.co_names) - set(known) - set(vars(builtins))
    if unknown:
        raise TypeError(f"{expression} has no counterpart in {'torch' if of_tensors else 'math'}: {sorted(unknown)}")
    return tuple(map(str, symbols)), function


def evaluate(form: Form, step: Any) -> Any:
    """The value at a step: a float for a number; for a tensor of steps, a new tensor of its dtype and shape.

    A tensor's value is computed in float64 whatever the dtype of the steps, for float32 does not hold 0.9999 well
    enough to be raised to the power of 10,000; in float32 on devices that lack float64.
    """
    expression, values = form
    names, function = compiled(expression, isinstance(step, Tensor))
    if not isinstance(step, Tensor):
        return float(function(float(step), *(float(values[name]) for name in names)))
    wide = step.to(torch.float32 if step.device.type == "mps" else torch.float64)
    given = (values[name] for name in names)
    numbers = [v.detach().reshape(()).to(step.device) if isinstance(v, Tensor) else v for v in given]
    result = function(wide, *numbers) + torch.zeros_like(wide)  # a constant, too, gets the shape
    return result.to(step.dtype if step.is_floating_point() else torch.get_default_dtype())


def traced(function: Callable[[Any], Any], name: str, first: int = 0) -> sp.Expr:
    """What a function of one number computes, as an expression in ``t``, if it takes a symbol too.

    Raises:
        TypeError: if it does not, or if of the numbers from ``first`` on it makes something else than of a symbol.
    """
    try:
        expression = sp.sympify(function(t), strict=True)
        ours = compiled(expression)[1]
        pairs = ((ours(i), function(i)) for i in range(first, 1000))
        differs = any(not abs(a - b) <= 1e-9 * abs(b) + 1e-12 for a, b in pairs)
    except Exception as error:  # whatever a function raises that was written for numbers
        raise TypeError(f"{name} is not symbolic: it takes no symbol ({type(error).__name__}: {error})") from error
    if differs:
        raise TypeError(f"{name} is not symbolic: of a symbol it makes {expression}, and of numbers something else")
    return expression
