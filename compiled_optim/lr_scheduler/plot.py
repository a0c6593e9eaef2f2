"""A picture of a schedule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compiled_optim.lr_scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_schedule(
    schedule: Scheduler, steps: int, *, ax: Axes | None = None, of: str = "lr", path: str | Path | None = None
) -> Axes:
    """Draws a schedule over ``range(steps)``, a line for each param group that has one of its own.

    Args:
        schedule: a scheduler of this package; it is not stepped.
        steps: how many steps to draw.
        ax: where to draw; default a new figure.
        of: "lr" or "momentum".
        path: a file to write the figure to; the suffix says the format.

    Raises:
        ImportError: without matplotlib.
        TypeError: for a schedule that is none of this package's, or that is no function of the step.
        ValueError: for less than one step.
    """
    if not isinstance(schedule, Scheduler):
        raise TypeError(f"schedule must be a scheduler of compiled_optim.lr_scheduler, got {type(schedule).__name__}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    curves = {tuple(curve(schedule, steps, i, of)): i for i in reversed(range(len(schedule.optimizer.param_groups)))}
    if ax is None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plot_schedule needs matplotlib: pip install matplotlib") from None
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)  # draws to memory: no display is needed
        ax = figure.subplots()
    for values, group in reversed(curves.items()):
        ax.plot(range(steps), values, label=f"{type(schedule).__name__}, group {group}")
    ax.set(xlabel="step", ylabel="learning rate" if of == "lr" else of)
    ax.legend()
    if path is not None:
        ax.get_figure(root=True).savefig(path)  # type: ignore[union-attr]
    return ax


def curve(schedule: Scheduler, steps: int, group: int = 0, of: str = "lr") -> list[Any]:
    """The values at ``range(steps)``."""
    try:
        values: list[Any] = schedule.value(torch.arange(steps, dtype=torch.float64, device="cpu"), group, of).tolist()
    except TypeError:  # for functions of numbers only
        values = [schedule.value(i, group, of) for i in range(steps)]
    return values
