"""Prints the formula of a schedule and some of its values, and draws it.

``python -m compiled_optim.lr_scheduler OneCycleLR max_lr=0.1 total_steps=1000 --plot out.png``
"""

from __future__ import annotations

import argparse
import ast
import inspect
from typing import Any

import torch

from compiled_optim import lr_scheduler
from compiled_optim.lr_scheduler.plot import curve
from compiled_optim.lr_scheduler.text import read

_NEED_MORE = {"ChainedScheduler", "LRScheduler", "LambdaLR", "MultiplicativeLR", "ReduceLROnPlateau", "SequentialLR"}
NAMES = [name for name in lr_scheduler.__all__ if name[0].isupper() and name not in _NEED_MORE]


def parse(scheduler: Any, arguments: list[str], lr: float) -> dict[str, Any]:
    """The arguments ``name=value`` of a scheduler; an expression is as for `read`, other values are Python's literals.

    Raises:
        ValueError: naming the argument.
    """
    known = [name for name in inspect.signature(scheduler).parameters if name != "optimizer"]
    values: dict[str, Any] = {}
    for argument in arguments:
        name, separator, text = argument.partition("=")
        if not separator or name not in known:
            raise ValueError(f"{scheduler.__name__} takes {', '.join(f'{n}=...' for n in known)}; got {argument!r}")
        try:
            values[name] = read(text, lr) if name == "expression" else ast.literal_eval(text)
        except (MemoryError, RecursionError, SyntaxError, ValueError):
            if name == "expression":
                raise
            values[name] = text
    return values


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m compiled_optim.lr_scheduler", description=__doc__)
    parser.add_argument("scheduler", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("arguments", nargs="*", metavar="name=value", help="arguments of the scheduler")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of the optimizer (default: 0.1)")
    parser.add_argument("--steps", type=int, help="how many steps to show (default: total_steps, or 100)")
    parser.add_argument("--plot", metavar="FILE", help="draw it to this file")
    options = parser.parse_args(argv)
    if options.scheduler not in NAMES:
        parser.error(f"scheduler must be one of {', '.join(NAMES)}; got {options.scheduler!r}")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options.lr, momentum=0.9)
    try:
        cls = getattr(lr_scheduler, options.scheduler)
        schedule = cls(optimizer, **parse(cls, options.arguments, options.lr))
        steps = getattr(schedule, "total_steps", 100) if options.steps is None else options.steps
        if steps < 1:
            raise ValueError(f"--steps must be positive, got {steps}")
        print(f"lr(t) = {schedule.expression()}\n{schedule.latex()}")
        values = curve(schedule, steps)
        if options.plot:
            lr_scheduler.plot_schedule(schedule, steps, path=options.plot)
    except (ArithmeticError, ImportError, OSError, TypeError, ValueError) as error:
        parser.error(f"{options.scheduler}: {error}")
    for i in sorted({round(k * (steps - 1) / 10) for k in range(11)}):
        print(f"{i:>8}  {values[i]:.6g}")


if __name__ == "__main__":
    main()
