"""What is done in the launch of an update: clipping, unscaling, an average, master weights, dtypes of state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

STATE_DTYPES = (torch.float32, torch.bfloat16)
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_
RANDOM_NUMBERS = 1 << 24  # that a step can have, each exact in float32
_SEED_FACTOR = 0x5851F42D4C957F2D  # so that seeds in a row begin far apart


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an update of parameters of ``dtype`` is computed in."""
    return _WIDER.get(dtype, dtype)


class Extras(NamedTuple):
    """What of the options decides a kernel.

    Attributes:
        factor: whether gradients are multiplied by a number that each step has anew.
        ema, master: whether there is an average, and a float32 master of half-precision parameters.
        rounding: whether bfloat16 parameters are rounded at random.
        state_dtype: of the moments, or None for the dtype that they have by default.
        counts: whether steps are counted even if the algorithm itself needs no count.
    """

    factor: bool = False
    ema: bool = False
    master: bool = False
    rounding: bool = False
    state_dtype: torch.dtype | None = None
    counts: bool = False

    @property
    def numbers(self) -> tuple[str, ...]:
        """What each step is given beside the hyperparameters."""
        return ("grad_factor",) * self.factor + ("ema_decay",) * self.ema + ("rounding_seed",) * self.rounding

    @property
    def any(self) -> bool:
        return self != _NONE

    def dtype_of_state(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the moments of a parameter of ``dtype``."""
        if dtype.is_complex:
            return dtype
        return self.state_dtype or (arithmetic_dtype(dtype) if self.master else dtype)

    def __str__(self) -> str:
        words = {"factor": self.factor, "ema": self.ema, "master": self.master, "rounded": self.rounding}
        return ", ".join(word for word, on in words.items() if on)


_NONE = Extras()


@dataclass(repr=False, eq=False)
class OnePass:
    """The arguments of a constructor that say what surrounds the update; see `Optimizer`.

    ``norm``: of the last step's gradients, and ``skipped``: how many steps were; each may be a tensor on a device.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """

    max_grad_norm: float | None = None
    norm_type: float = 2.0
    error_if_nonfinite: bool = False
    skip_nonfinite: bool = False
    ema_decay: float | Callable[[int], float] | None = None
    state_dtype: torch.dtype | None = None
    master_weights: bool = False
    stochastic_rounding: bool | int = False

    def __post_init__(self) -> None:
        self.norm: float | Tensor | None = None
        self.skipped: int | Tensor = 0
        if self.max_grad_norm is not None and not _number(self.max_grad_norm) >= 0:
            raise ValueError(f"max_grad_norm must be at least 0 or None, got {self.max_grad_norm!r}")
        if self.norm_type not in (2, math.inf, "inf"):
            raise ValueError(f"norm_type must be 2 or inf, got {self.norm_type!r}")
        self.norm_type = float(self.norm_type)
        if self.error_if_nonfinite and self.max_grad_norm is None:
            raise ValueError("error_if_nonfinite=True needs max_grad_norm, got max_grad_norm=None")
        if self.error_if_nonfinite and self.skip_nonfinite:
            raise ValueError("error_if_nonfinite=True and skip_nonfinite=True exclude each other")
        if self.ema_decay is not None and not callable(self.ema_decay) and not 0 <= _number(self.ema_decay) <= 1:
            raise ValueError(
                f"ema_decay must be at least 0 and at most 1, a function of the step, or None, got {self.ema_decay!r}"
            )
        if self.state_dtype not in (None, *STATE_DTYPES):
            raise ValueError(f"state_dtype must be None or one of {list(STATE_DTYPES)}, got {self.state_dtype!r}")
        if not isinstance(self.stochastic_rounding, int):
            raise TypeError(f"stochastic_rounding must be a bool or an int, got {self.stochastic_rounding!r}")
        if self.master_weights and self.stochastic_rounding is not False:
            raise ValueError("stochastic_rounding takes the place of master_weights, got both")

    def but(self, **changed: Any) -> OnePass:
        """The same with other values of some arguments, and what the last step found."""
        new = replace(self, **changed)
        new.norm, new.skipped = self.norm, self.skipped
        return new

    @property
    def extras(self) -> Extras:
        rounding = self.stochastic_rounding is not False
        return Extras(
            # with an average or masters alone, for the sake of a GradScaler: it unscales no float16 gradients itself
            factor=self.needs_norm or self.ema_decay is not None or bool(self.master_weights),
            ema=self.ema_decay is not None,
            master=bool(self.master_weights),
            rounding=rounding,
            state_dtype=self.state_dtype,
            # a step that a device skips is not counted, so that the host cannot tell which was the first
            counts=rounding or self.ema_decay is not None or self.skip_nonfinite,
        )

    @property
    def needs_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def is_constant(self) -> bool:
        """Whether every step without a GradScaler is given the same `Extras.numbers`."""
        return not self.needs_norm and self.ema_decay is None

    def factor(self, norm: Any, scale: Any) -> Any:
        """What gradients are multiplied by, as clip_grad_norm_ does; ``norm``: of the unscaled gradients.

        Args:
            norm, scale: numbers, or tensors on a device. ``scale`` is that of a GradScaler.
        """
        inverse = 1.0 / scale
        if self.max_grad_norm is None:
            return inverse
        clip = self.max_grad_norm / (norm + _EPS)
        clip = clip.clamp(max=1.0) if isinstance(clip, Tensor) else 1.0 if clip > 1 else clip
        return inverse * clip if isinstance(scale, Tensor) or scale != 1 else clip  # on a device, a launch less

    def given(self, factor: Any) -> dict[str, Any]:
        """The `Extras.numbers` of a step: the decay is a number, or a function of the step."""
        seed = float(int(self.stochastic_rounding) * _SEED_FACTOR % RANDOM_NUMBERS)
        return {"grad_factor": factor, "ema_decay": self.ema_decay, "rounding_seed": seed}


# The arguments, with their defaults.
ARGUMENTS: dict[str, Any] = {f.name: f.default for f in fields(OnePass)}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
