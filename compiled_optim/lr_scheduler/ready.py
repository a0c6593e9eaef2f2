r"""Schedules that are written by hand in most training scripts, one call each, under the names of transformers.

Each returns a `LambdaLR` whose factor is a closed form: :math:`\eta_t = \eta_0 f(t)`. It has a value, an expression and
a picture without being traced, and its ``state_dict`` is that of transformers' schedule, which either side loads. In
the formulas, W is ``num_warmup_steps``, T ``num_training_steps``, and :math:`x = (t - W) / (T - W)` the place after
warm-up. The first W steps rise from 0 by :math:`t / W`. `warmup` puts other ways up before any schedule.

All take ``last_epoch`` as `LambdaLR` does, and raise ValueError for a negative number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from compiled_optim._engine import settings
from compiled_optim._engine.declaration import coerce
from compiled_optim.lr_scheduler.formulas import RAMPS, Factor, annealed, library, minimum, piecewise, ramp
from compiled_optim.lr_scheduler.schedules import LambdaLR


def _schedule(optimizer: Optimizer, last_epoch: int, formula: Callable[..., Any], **values: Any) -> LambdaLR:
    values = {name: coerce(value) for name, value in values.items()}
    for name, value in values.items():
        if name.endswith("_steps") and not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value!r}")
    return LambdaLR(optimizer, Factor(formula, **values), last_epoch)


def _warmed(t: Any, num_warmup_steps: Any, *then: Callable[[], Any], ends: tuple[Any, ...] = ()) -> Any:
    """The linear warm-up, and after it what follows at its end and at ``ends``."""
    pieces = [lambda: t / max(1, num_warmup_steps), *then]
    return piecewise(t, [num_warmup_steps, *ends], lambda i: pieces[i]())


def _progress(t: Any, num_warmup_steps: Any, num_training_steps: Any) -> Any:
    return (t - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)


def _constant(t: Any, num_warmup_steps: Any) -> Any:
    return _warmed(t, num_warmup_steps, lambda: 1.0)


def get_constant_schedule(optimizer: Optimizer, last_epoch: int = -1) -> LambdaLR:
    r""":math:`f(t) = 1`."""
    return _schedule(optimizer, last_epoch, _constant, num_warmup_steps=0)


def get_constant_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int, last_epoch: int = -1) -> LambdaLR:
    r""":math:`f(t) = 1` after warm-up."""
    return _schedule(optimizer, last_epoch, _constant, num_warmup_steps=num_warmup_steps)


def _linear(t: Any, num_warmup_steps: Any, num_training_steps: Any) -> Any:
    left = num_training_steps - minimum(t, num_training_steps)
    return _warmed(t, num_warmup_steps, lambda: left / max(1, num_training_steps - num_warmup_steps))


def get_linear_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    r""":math:`f(t) = \max(0, 1 - x)` after warm-up."""
    steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    return _schedule(optimizer, last_epoch, _linear, **steps)


def _cosine(t: Any, num_warmup_steps: Any, num_training_steps: Any, num_cycles: float, min_lr_rate: float) -> Any:
    def decay() -> Any:
        x = _progress(t, num_warmup_steps, num_training_steps)
        return min_lr_rate + (1 - min_lr_rate) * annealed(2 * num_cycles * x)

    return _warmed(t, num_warmup_steps, decay)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 0.5, last_epoch: int = -1
) -> LambdaLR:
    r""":math:`f(t) = (1 + \cos(2 \pi c x)) / 2` after warm-up, with ``num_cycles`` c waves.

    Loshchilov & Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017.
    """
    steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    return _schedule(optimizer, last_epoch, _cosine, **steps, num_cycles=num_cycles, min_lr_rate=0.0)


def _default_lr(optimizer: Optimizer) -> float:
    """The learning rate that the optimizer was given. One that is a tensor may have been moved since."""
    lr = optimizer.defaults["lr"]
    if not isinstance(lr, Tensor):
        return float(lr)
    initial = (group["initial_lr"] for group in optimizer.param_groups if group["lr"] is lr and "initial_lr" in group)
    return float(next(initial, lr.detach()))


def _rate(optimizer: Optimizer, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError(f"one of min_lr and min_lr_rate must be given, got {min_lr!r} and {min_lr_rate!r}")
    for name, value in (("min_lr", min_lr), ("min_lr_rate", min_lr_rate)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value!r}")
    return min_lr / _default_lr(optimizer) if min_lr_rate is None else min_lr_rate  # type: ignore[operator]


def get_cosine_with_min_lr_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> LambdaLR:
    r""":math:`f(t) = r + (1 - r) (1 + \cos(2 \pi c x)) / 2` after warm-up, from 1 down to a floor.

    Args:
        num_cycles: c.
        min_lr: the floor, for a param group that has the optimizer's default learning rate: r is ``min_lr`` over that.
        min_lr_rate: r, the floor as a share of the learning rate of each param group. One of the two must be given.
    """
    values = {"num_cycles": num_cycles, "min_lr_rate": _rate(optimizer, min_lr, min_lr_rate)}
    steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    return _schedule(optimizer, last_epoch, _cosine, **steps, **values)


def _cosine_from_rate(
    t: Any, num_warmup_steps: Any, num_training_steps: Any, num_cycles: float, min_lr_rate: float, warmup_lr_rate: Any
) -> Any:
    def phase(i: int) -> Any:
        if i == 1:
            x = _progress(t + 1, num_warmup_steps, num_training_steps)
            return min_lr_rate + (1 - min_lr_rate) * annealed(2 * num_cycles * x)
        if warmup_lr_rate is None:
            return (t + 1) / max(1, num_warmup_steps)
        return warmup_lr_rate + (1 - warmup_lr_rate) * t / max(1, num_warmup_steps - 1)

    return piecewise(t, [num_warmup_steps], phase)


def get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> LambdaLR:
    """`get_cosine_with_min_lr_schedule_with_warmup`, a step ahead, and from ``warmup_lr_rate`` up instead of from 0.

    The first step has the factor ``warmup_lr_rate``, or 1 / W without one, and the last of W steps has 1.
    """
    values = {"num_cycles": num_cycles, "min_lr_rate": _rate(optimizer, min_lr, min_lr_rate)}
    steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    return _schedule(optimizer, last_epoch, _cosine_from_rate, **steps, **values, warmup_lr_rate=warmup_lr_rate)


def _restarts(t: Any, num_warmup_steps: Any, num_training_steps: Any, num_cycles: Any) -> Any:
    def wave() -> Any:
        return annealed(num_cycles * _progress(t, num_warmup_steps, num_training_steps) % 1)

    end = max(num_training_steps, num_warmup_steps + 1)
    return _warmed(t, num_warmup_steps, wave, lambda: 0.0, ends=(end,))


def get_cosine_with_hard_restarts_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: int = 1, last_epoch: int = -1
) -> LambdaLR:
    r""":math:`f(t) = (1 + \cos(\pi (c x - \lfloor c x \rfloor))) / 2` after warm-up, and 0 from T on.

    ``num_cycles`` c is how often it falls from 1 to 0.

    Loshchilov & Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017.
    """
    steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    return _schedule(optimizer, last_epoch, _restarts, **steps, num_cycles=num_cycles)


def _polynomial(t: Any, num_warmup_steps: Any, num_training_steps: Any, power: float, end_rate: float) -> Any:
    def decay() -> Any:
        return end_rate + (1 - end_rate) * (1 - _progress(t, num_warmup_steps, num_training_steps)) ** power

    end = max(num_training_steps, num_warmup_steps)
    return _warmed(t, num_warmup_steps, decay, lambda: end_rate, ends=(end,))


def get_polynomial_decay_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_end: float = 1e-7,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    r""":math:`f(t) = r + (1 - r) (1 - \min(1, x))^p` after warm-up, with ``power`` p.

    Args:
        lr_end: the end, below the optimizer's default learning rate: r is ``lr_end`` over that.
    """
    initial = _default_lr(optimizer)
    if not lr_end < initial:
        raise ValueError(f"lr_end must be below the learning rate {initial!r}, got {lr_end!r}")
    steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    return _schedule(optimizer, last_epoch, _polynomial, **steps, power=power, end_rate=lr_end / initial)


def _inverse_sqrt(t: Any, num_warmup_steps: Any, timescale: Any) -> Any:
    shift = timescale - num_warmup_steps
    return _warmed(t, num_warmup_steps, lambda: 1 / library(t).sqrt((t + shift) / timescale))


def get_inverse_sqrt_schedule(
    optimizer: Optimizer, num_warmup_steps: int, timescale: int | None = None, last_epoch: int = -1
) -> LambdaLR:
    r""":math:`f(t) = \sqrt{s / (t - W + s)}` after warm-up.

    Args:
        timescale: s, in steps; default: W, or 10,000 without warm-up.

    Zhai et al., Scaling Vision Transformers, CVPR 2022.
    """
    timescale = num_warmup_steps or 10_000 if timescale is None else timescale
    if not timescale > 0:
        raise ValueError(f"timescale must be above 0, got {timescale!r}")
    values = {"num_warmup_steps": num_warmup_steps, "timescale": timescale}
    return _schedule(optimizer, last_epoch, _inverse_sqrt, **values)


def _noam(t: Any, d_model: Any, num_warmup_steps: Any) -> Any:
    return d_model**-0.5 * minimum(1 / library(t).sqrt(t + 1), (t + 1) * num_warmup_steps**-1.5)


def get_noam_schedule(optimizer: Optimizer, d_model: int, num_warmup_steps: int, last_epoch: int = -1) -> LambdaLR:
    r""":math:`f(t) = d^{-1/2} \min(n^{-1/2}, n W^{-3/2})` with :math:`n = t + 1`, for the paper's first step is 1.

    The paper multiplies it by no other learning rate: give the optimizer 1.

    Args:
        d_model: d, the width of the model.

    Vaswani et al., Attention Is All You Need, NeurIPS 2017.
    """
    for name, value in (("d_model", d_model), ("num_warmup_steps", num_warmup_steps)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value!r}")
    return _schedule(optimizer, last_epoch, _noam, d_model=d_model, num_warmup_steps=num_warmup_steps)


def _rex(t: Any, num_warmup_steps: Any, num_training_steps: Any) -> Any:
    def decay() -> Any:
        left = 1 - _progress(t, num_warmup_steps, num_training_steps)
        return 2 * left / (1 + left)

    end = max(num_training_steps, num_warmup_steps)
    return _warmed(t, num_warmup_steps, decay, lambda: 0.0, ends=(end,))


def get_rex_schedule(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    r""":math:`f(t) = (1 - x) / (1/2 + (1 - x) / 2)` after warm-up, and 0 from T on; the paper has no warm-up.

    Chen et al., REX: Revisiting Budgeted Training with an Improved Schedule, 2021 (arXiv:2107.04197).
    """
    steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    return _schedule(optimizer, last_epoch, _rex, **steps)


def _wsd(
    t: Any,
    num_warmup_steps: Any,
    num_stable_steps: Any,
    num_decay_steps: Any,
    warmup_type: str,
    decay_type: str,
    min_lr_ratio: float,
    num_cycles: float,
) -> Any:
    begin = num_warmup_steps + num_stable_steps

    def phase(i: int) -> Any:
        if i == 0:
            height = ramp(t / max(1, num_warmup_steps), warmup_type)
        elif i == 2:
            x = (t - begin) / max(1, num_decay_steps)
            height = ramp(1 - x * (2 * num_cycles if decay_type == "cosine" else 1), decay_type)
        else:
            height = 1.0 if i == 1 else 0.0
        return min_lr_ratio + (1 - min_lr_ratio) * height

    return piecewise(t, [num_warmup_steps, begin, begin + num_decay_steps], phase)


def get_wsd_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_decay_steps: int,
    num_training_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> LambdaLR:
    r"""Warm-up, stable, decay: up from r to 1, there for a while, and down to r, which the rest of training has.

    :math:`f(t) = r + (1 - r) h`, where h rises as y, :math:`(1 - \cos \pi y) / 2` or :math:`1 - \sqrt{1 - y}` in the
    share y of the warm-up, and falls as :math:`1 - y`, :math:`(1 + \cos 2 \pi c y) / 2` or :math:`1 - \sqrt{y}` in that
    of the decay.

    Args:
        num_training_steps: all steps, of which those that are not for warm-up or decay are stable; or
        num_stable_steps: those between. One of the two must be given; of both, this counts.
        warmup_type, decay_type: "linear", "cosine" or "1-sqrt".
        min_lr_ratio: r. num_cycles: c.

    Hu et al., MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies, 2024.
    """
    if num_stable_steps is None:
        if num_training_steps is None:
            raise ValueError("num_training_steps or num_stable_steps must be given, got None for both")
        num_stable_steps = num_training_steps - num_warmup_steps - num_decay_steps
        if num_stable_steps < 0:
            least = f"num_warmup_steps + num_decay_steps = {num_warmup_steps + num_decay_steps}"
            raise ValueError(f"num_training_steps must be at least {least}, got {num_training_steps}")
    elif num_training_steps is not None:
        settings.warn("num_stable_steps is used, and num_training_steps is not: both were given", UserWarning)
    types = [kind for kind in RAMPS if kind != "polynomial"]
    for name, kind in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if kind not in types:
            raise ValueError(f"{name} must be one of {types}, got {kind!r}")
    steps = {"num_warmup_steps": num_warmup_steps, "num_decay_steps": num_decay_steps}
    kinds = {"warmup_type": warmup_type, "decay_type": decay_type}
    values = {"num_stable_steps": num_stable_steps, "min_lr_ratio": min_lr_ratio, "num_cycles": num_cycles}
    return _schedule(optimizer, last_epoch, _wsd, **steps, **kinds, **values)


def _ema_decay(t: Any, decay: float) -> Any:
    return minimum((1 + t) / (10 + t), decay)


def get_ema_decay_fn(decay: float = 0.9999) -> Callable[[Any], Any]:
    r"""The decay of an average that follows quickly at first: :math:`\min(d, (1 + t) / (10 + t))` after t updates.

    For the ``ema_decay`` of an optimizer and for ``swa_utils.get_ema_avg_fn``: a function of a number, a tensor or a
    symbol alike.

    Args:
        decay: d, in [0, 1].

    Example:
        >>> from compiled_optim.lr_scheduler import get_ema_decay_fn
        >>> decay = get_ema_decay_fn(0.999)
        >>> decay(0), decay(10), decay(100_000)
        (0.1, 0.55, 0.999)
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be at least 0 and at most 1, got {decay!r}")
    return Factor(_ema_decay, decay=decay)
