"""Prints the formula of a schedule and some of its values, and draws it.

``python -m compiled_optim.lr_scheduler OneCycleLR max_lr=0.1 total_steps=1000 --plot out.png``

A schedule made of schedules is written as in Python, without the optimizer:
``python -m compiled_optim.lr_scheduler "warmup(CosineAnnealingLR(T_max=90), 10)"``
"""

from __future__ import annotations

import argparse
import ast
import inspect
from typing import Any

import torch

from compiled_optim import lr_scheduler
from compiled_optim.lr_scheduler.plot import curve

_NO_FORMULAS = {"LRScheduler", "LambdaLR", "MultiplicativeLR", "ReduceLROnPlateau", "get_ema_decay_fn", "plot_schedule"}
NAMES = [name for name in lr_scheduler.__all__ if name not in _NO_FORMULAS]


def parse(name: str, arguments: list[str]) -> dict[str, Any]:
    """The arguments ``name=value`` of a scheduler; a value that is no literal of Python's is a text.

    Raises:
        ValueError: naming the argument.
    """
    usage = _usage(name)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator or key not in _parameters(name):
            raise ValueError(f"{usage}; got {argument!r}")
        try:
            values[key] = ast.literal_eval(text)
        except (MemoryError, RecursionError, SyntaxError, ValueError):
            values[key] = text
    return values


def build(text: str, arguments: list[str], optimizer: torch.optim.Optimizer) -> Any:
    """The schedule that a name and arguments say, or a text such as ``warmup(StepLR(30), steps=5)``, which is not run.

    Raises:
        ValueError: naming what is wrong in it; and what the scheduler raises.
    """
    if "(" not in text:
        return _make(text, [], parse(text, arguments), optimizer)
    if arguments:
        raise ValueError(f"{text} has its arguments in parentheses; got {arguments[0]!r} after it")
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (MemoryError, RecursionError, SyntaxError, ValueError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    return _read(node, optimizer)


def _read(node: ast.AST, optimizer: torch.optim.Optimizer) -> Any:
    """The schedule, the list, or the literal of Python's that a node says."""
    match node:
        case ast.Call(ast.Name(name), given, keywords) if all(keyword.arg for keyword in keywords):
            _usage(name)  # a wrong name is told before what is in its parentheses
            positional = [_read(value, optimizer) for value in given]
            return _make(name, positional, {str(k.arg): _read(k.value, optimizer) for k in keywords}, optimizer)
        case ast.List(elements) | ast.Tuple(elements):
            return [_read(element, optimizer) for element in elements]
    try:
        return ast.literal_eval(node)
    except ValueError:
        text = ast.unparse(node)
        raise ValueError(f"arguments must be schedules, lists, numbers and texts in quotes, got {text!r}") from None


def _make(name: str, given: list[Any], named: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    usage, scheduler = _usage(name), getattr(lr_scheduler, name)
    signature = inspect.signature(scheduler)
    if next(iter(signature.parameters)) == "optimizer":
        given = [optimizer, *given]
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        raise ValueError(f"{usage}; {error}") from None
    return scheduler(*given, **named)


def _parameters(name: str) -> list[str]:
    if name not in NAMES:
        raise ValueError(f"scheduler must be one of {', '.join(NAMES)}; got {name!r}")
    return [key for key in inspect.signature(getattr(lr_scheduler, name)).parameters if key != "optimizer"]


def _usage(name: str) -> str:
    return f"{name} takes {', '.join(f'{key}=...' for key in _parameters(name))}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m compiled_optim.lr_scheduler", description=__doc__)
    parser.add_argument("scheduler", help=f"one of {', '.join(NAMES)}, or a call of one with others as arguments")
    parser.add_argument("arguments", nargs="*", metavar="name=value", help="arguments of the scheduler")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of the optimizer (default: 0.1)")
    parser.add_argument("--steps", type=int, help="how many steps to show (default: total_steps, or 100)")
    parser.add_argument("--plot", metavar="FILE", help="draw it to this file")
    options = parser.parse_args(argv)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options.lr, momentum=0.9)
    try:
        schedule = build(options.scheduler, options.arguments, optimizer)
        steps = getattr(schedule, "total_steps", 100) if options.steps is None else options.steps
        if steps < 1:
            raise ValueError(f"--steps must be positive, got {steps}")
        print(f"lr(t) = {schedule.expression()}\n{schedule.latex()}")
        values = curve(schedule, steps)
        if options.plot:
            lr_scheduler.plot_schedule(schedule, steps, path=options.plot)
    except (ArithmeticError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        parser.error(f"{options.scheduler}: {error}")
    for i in sorted({round(k * (steps - 1) / 10) for k in range(11)}):
        print(f"{i:>8}  {values[i]:.6g}")


if __name__ == "__main__":
    main()
