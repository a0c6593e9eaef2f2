"""A sympy expression from text, which is read and never run as code."""

from __future__ import annotations

import ast
import math
import operator
from typing import Any

import sympy as sp  # type: ignore[import-untyped]

from compiled_optim.lr_scheduler.symbolic import base_lr, lambdified, t

_LONGEST, _DEEPEST = 1000, 30  # characters, and parts in parts
_LARGEST = 1000  # number as an exponent

_ARITHMETIC: dict[type[ast.AST], Any] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Mod: sp.Mod},
}
_LOGIC: dict[type[ast.AST], Any] = {
    **{ast.Lt: sp.Lt, ast.LtE: sp.Le, ast.Gt: sp.Gt, ast.GtE: sp.Ge, ast.Eq: sp.Eq, ast.NotEq: sp.Ne},
    **{ast.And: sp.And, ast.Or: sp.Or, ast.Not: sp.Not},
}
_FUNCTIONS = "sin cos tan asin acos atan sinh cosh tanh exp log sqrt erf floor ceiling sign Abs Min Max Piecewise Mod"
_CALLS: dict[str, Any] = {name: getattr(sp, name) for name in _FUNCTIONS.split()}
_CALLS |= {"abs": sp.Abs, "ceil": sp.ceiling, "max": sp.Max, "min": sp.Min}  # as Python calls them


def read(text: str) -> sp.Expr:
    """The expression in the step ``t`` that a text says in the notation of Python and sympy.

    It may have numbers, ``t``, ``base_lr``, ``pi``, ``E``, arithmetic, and sympy's functions of ``Piecewise``. What is
    a number is computed in floating point, but for fractions: so no number is long.

    Raises:
        ValueError: for anything else, and for what is too long, too deep or too large; the message has the text.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"expression must have at most {_LONGEST} characters, got {len(text)}: {text[:50]!r}...")
    names = {"t": t, "base_lr": base_lr, "pi": sp.pi, "E": sp.E}
    try:
        found = _read(ast.parse(text.strip().replace("^", "**"), mode="eval").body, names, _DEEPEST)
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"expression cannot be read: {error}; got {text!r}") from error
    if not isinstance(found, sp.Expr):
        raise ValueError(f"expression must be a number for each t, got {text!r}")
    return found


def _read(node: ast.AST, names: dict[str, sp.Expr], depth: int) -> Any:
    if depth == 0:
        raise ValueError(f"it must be at most {_DEEPEST} parts deep")

    def parts(*nodes: ast.AST) -> list[Any]:
        return [_read(part, names, depth - 1) for part in nodes]

    match node:
        case ast.Constant(bool(value)):
            return sp.sympify(value)
        case ast.Constant(int(value) | float(value)) if math.isfinite(value):
            return sp.sympify(value)
        case ast.Name(name) if name in names:
            return names[name]
        case ast.Tuple(elements):
            return tuple(parts(*elements))
        case ast.BinOp(left, ast.Pow(), right):
            return _power(*parts(left, right))
        case ast.BinOp(left, operation, right) if type(operation) in _ARITHMETIC:
            return _ARITHMETIC[type(operation)](*parts(left, right))
        case ast.UnaryOp(operation, operand) if type(operation) in _ARITHMETIC | _LOGIC:
            return (_ARITHMETIC | _LOGIC)[type(operation)](*parts(operand))
        case ast.BoolOp(operation, values):
            return _LOGIC[type(operation)](*parts(*values))
        case ast.Compare(left, operations, others) if all(type(operation) in _LOGIC for operation in operations):
            values = parts(left, *others)
            pairs = zip(operations, values, values[1:], strict=False)
            return sp.And(*(_LOGIC[type(operation)](a, b) for operation, a, b in pairs))
        case ast.Call(ast.Name(name), arguments, []) if name in _CALLS:
            return _call(_CALLS[name], parts(*arguments))
    raise ValueError(
        f"it may have numbers, t, base_lr, pi, E and {', '.join(sorted(_CALLS))}, not {ast.unparse(node)!r}"
    )


def _call(function: Any, arguments: list[Any]) -> Any:
    if all(isinstance(a, sp.Expr) and a.is_number for a in arguments):
        return _computed(function(*arguments, evaluate=False))
    if function in (sp.Min, sp.Max):
        arguments = [_float(a) for a in arguments]
    elif function is sp.Piecewise:
        arguments = [(_float(value), condition) for value, condition in arguments]
    return function(*arguments)


def _power(base: Any, exponent: Any) -> Any:
    if exponent.is_number:
        if abs(float(exponent)) > _LARGEST:
            raise ValueError(f"an exponent must be at most {_LARGEST}, got {sp.N(exponent, 6)}")
        if base.is_number:
            return _computed(sp.Pow(base, exponent, evaluate=False))
    power = sp.Pow(_float(base), exponent)
    # sympy may expand it, to find out its sign
    degree = math.prod(max(1.0, abs(float(p.exp))) for p in power.atoms(sp.Pow) if p.exp.is_number)
    if degree > _LARGEST:
        raise ValueError(f"exponents in each other must multiply to at most {_LARGEST}, got {degree:g}")
    return power


def _computed(expression: sp.Expr) -> sp.Expr:
    value = float(lambdified(expression)(0.0, 1.0))
    if not math.isfinite(value):
        raise ValueError(f"a number must be finite, got {value}")
    return sp.Float(value)


def _float(value: Any) -> Any:
    return sp.Float(float(value)) if value.is_number else value
