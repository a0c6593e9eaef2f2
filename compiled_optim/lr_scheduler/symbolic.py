"""The part of schedules that needs sympy: functions as expressions in the step ``t``, and expressions as functions."""

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

from compiled_optim._engine import values
from compiled_optim.lr_scheduler.formulas import is_symbolic

t, base_lr = sp.Symbol("t", nonnegative=True), sp.Symbol("base_lr", real=True)


class _Printer(PythonCodePrinter):  # type: ignore[misc]
    """Python code that computes with numbers and with tensors. Of a number, only the piece it is in is computed."""

    def _print_Float(self, expr: sp.Expr) -> str:
        return repr(float(expr))  # sympy writes 15 digits

    def _print_Mul(self, expr: sp.Expr) -> str:
        # sympy writes t/49 as (1/49)*t, of which the floor at t = 49 is 0
        numerator, denominator = sp.fraction(expr, exact=True)
        if denominator == 1:
            return str(super()._print_Mul(expr))
        return f"divide({self._print(numerator)}, {self._print(denominator)})"

    def _print_Piecewise(self, expr: sp.Expr) -> str:
        code = "nan"
        for value, condition in reversed(expr.args):
            value = self._print(value)
            last = condition == sp.true
            code = value if last else f"where({self._print(condition)}, lambda: {value}, lambda: {code})"
        return code

    def _print_And(self, expr: sp.Expr, operator: str = " & ") -> str:
        return "(" + operator.join(f"({self._print(part)})" for part in expr.args) + ")"

    def _print_Or(self, expr: sp.Expr) -> str:
        return self._print_And(expr, " | ")

    def _print_Not(self, expr: sp.Expr) -> str:
        return f"(({self._print(expr.args[0])}) ^ True)"  # of a bool, ~ makes a number

    def _print_sign(self, expr: sp.Expr) -> str:
        return f"sign({self._print(expr.args[0])})"


def _divide(a: Any, b: Any) -> Any:
    # CUDA multiplies by the reciprocal of a number, and rounds t/49 as sympy's text would
    return a / torch.full_like(a, b) if isinstance(a, Tensor) and not isinstance(b, Tensor) else a / b


def _where(condition: Any, a: Callable[[], Any], b: Callable[[], Any]) -> Any:
    if isinstance(condition, Tensor):
        return values.where(condition, a(), b())
    return a() if condition else b()


def _elementwise(name: str, function: Any) -> Any:
    def apply(*arguments: Any) -> Any:
        if not any(isinstance(a, Tensor) for a in arguments):
            # floats, not Python's integers: powers of those may have more digits than there is time and memory for
            return float(function(*arguments))
        if not hasattr(torch, name):
            raise TypeError(f"{name} has no counterpart in torch")
        return getattr(torch, name)(*arguments)

    return apply if callable(function) else function


_CODE = {
    **{name: _elementwise(name, function) for name, function in vars(math).items()},
    "sign": _elementwise("sign", lambda x: (x > 0) - (x < 0)),
    "divide": _divide,
    "where": _where,
    "min": lambda *parts: functools.reduce(lambda a, b: values.where(a < b, a, b), parts),
    "max": lambda *parts: functools.reduce(lambda a, b: values.where(a > b, a, b), parts),
}


@functools.lru_cache(maxsize=1024)
def lambdified(expression: sp.Expr) -> Callable[[Any, Any], Any]:
    """The function of ``t``, a float or a tensor, and ``base_lr``.

    Raises:
        TypeError: where a part of the expression has no counterpart in Python's ``math``.
    """
    printer = _Printer({"fully_qualified_modules": False})
    try:
        function = sp.lambdify([t, base_lr], expression, modules=[_CODE], printer=printer)
    except NotImplementedError as error:
        raise TypeError(f"{expression} has no counterpart in Python: {error}") from error
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if hasattr(constant, "co_names")]
    unknown = {name for code in codes for name in code.co_names} - set(_CODE) - set(vars(builtins))
    if unknown:
        raise TypeError(f"{expression} has no counterpart in math: {sorted(unknown)}")
    return function  # type: ignore[no-any-return]


def applied(expression: sp.Expr) -> Callable[..., Any]:
    """The expression as a formula: a function of a number, of a tensor and of a symbol."""
    function, step, start = lambdified(expression), t, base_lr

    def formula(t: Any, base_lr: Any = 1.0) -> Any:
        if is_symbolic(t):
            return expression.xreplace({step: t, start: sp.sympify(base_lr)})
        return function(t if isinstance(t, Tensor) else float(t), base_lr)

    return formula


def traced(function: Callable[[Any], Any], name: str, first: int = 0) -> sp.Expr:
    """What a function of one number computes, as an expression in ``t``, if it takes a symbol too.

    Raises:
        TypeError: if it does not, or if of the numbers from ``first`` on it makes something else than of a symbol.
    """
    try:
        expression = sp.sympify(function(t), strict=True)
        ours = lambdified(expression)
        pairs = ((ours(float(i), 1.0), function(i)) for i in range(first, 1000))
        differs = any(not abs(a - b) <= 1e-9 * abs(b) + 1e-12 for a, b in pairs)
    except Exception as error:  # whatever a function raises that was written for numbers
        raise TypeError(f"{name} is not symbolic: it takes no symbol ({type(error).__name__}: {error})") from error
    if differs:
        raise TypeError(f"{name} is not symbolic: of a symbol it makes {expression}, and of numbers something else")
    return expression


def product(factor: sp.Expr, name: str) -> sp.Expr:
    """The product of a factor at 1, 2, ..., ``t``.

    Raises:
        TypeError: if sympy finds none.
    """
    i = sp.Symbol("i", integer=True, positive=True)
    found = sp.gammasimp(sp.product(factor.xreplace({t: i}), (i, 1, t)))
    if found.has(sp.Product):
        raise TypeError(f"{name} is not symbolic: the product of {factor} over t has no closed form")
    return found


def in_our_symbols(expression: Any) -> sp.Expr:
    """The same expression of our ``t`` and ``base_lr``, whatever is assumed of symbols of these names.

    Raises:
        TypeError: for what is no expression.
        ValueError: for another symbol.
    """
    if not isinstance(expression, sp.Expr | int | float):
        raise TypeError(f"expression must be a sympy expression or the text of one, got {expression!r}")
    expression = sp.sympify(expression)
    known = {s.name: s for s in (t, base_lr)}
    others = sorted(s.name for s in expression.free_symbols if s.name not in known)
    if others:
        raise ValueError(f"expression may have the symbols t and base_lr, got {others[0]!r} in {expression}")
    return expression.xreplace({s: known[s.name] for s in expression.free_symbols})
