"""Muon."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from compiled_optim._engine.newton_schulz import newton_schulz, newton_schulz_of_list
from compiled_optim._engine.values import batched, lerp, of_shape
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, flag, number
from compiled_optim.optimizer import Optimizer

# How the learning rate follows the shape (rows, columns) of a matrix, which may be empty.
RATIOS = {
    "original": lambda shape: math.sqrt(max(1, shape[0] / max(1, shape[1]))),
    "match_rms_adamw": lambda shape: 0.2 * math.sqrt(max(shape)),
    "spectral_unclamped": lambda shape: math.sqrt(shape[0] / max(1, shape[1])),
}


def _check(h: Hyper) -> None:
    if h.adjust_lr_fn not in (None, *RATIOS):
        raise ValueError(f"Muon: adjust_lr_fn must be None or one of {[*RATIOS]}, got {h.adjust_lr_fn!r}")
    largest = torch.finfo(torch.float32).max
    if not all(abs(value) <= largest for value in (h.a, h.b, h.c, h.eps)):
        raise ValueError(f"Muon: ns_coefficients and eps must fit float32, got {(h.a, h.b, h.c)} and {h.eps!r}")
    if h.ns_steps >= 100 or h.ns_steps % 1:
        raise ValueError(f"Muon: ns_steps must be an integer below 100, got {h.ns_steps!r}")


class Muon(Optimizer):
    r"""Momentum whose matrices are orthogonalized (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    .. math::
        B \leftarrow B + (1 - \mu)(g - B), \qquad u = \mu B + (1 - \mu) g, \qquad
        \theta \leftarrow (1 - \gamma \lambda)\,\theta - \gamma\, r \operatorname{NS}_k(u / \lVert u \rVert)

    Without ``nesterov``, :math:`u = B`. :math:`\operatorname{NS}_k` are ``ns_steps`` Newton-Schulz iterations
    :math:`X \leftarrow aX + (b XX^T + c (XX^T)^2) X` in bfloat16, with the ``ns_coefficients`` :math:`a, b, c`. For an
    :math:`A \times B` matrix, ``adjust_lr_fn`` chooses :math:`r`: ``"original"``, the default,
    :math:`\sqrt{\max(1, A / B)}`; ``"match_rms_adamw"`` :math:`0.2 \sqrt{\max(A, B)}` (Liu et al. 2025,
    arXiv:2502.16982); ``"spectral_unclamped"`` :math:`\sqrt{A / B}`.

    Only for matrices: give embeddings, biases and the last layer to AdamW, or all to :class:`MuonAdamW`.
    """

    lr: float | Tensor = number(default=1e-3, low=0, unit="parameter", help="learning rate")
    weight_decay: float = number(default=0.1, low=0, unit="1 / lr", help="decay of the parameter per step")
    momentum: float = number(default=0.95, low=0, help="decay of the momentum per step")
    nesterov: bool = flag(default=True, switch=True, help="look a step of momentum ahead")
    ns_coefficients: tuple[float, float, float] = number(
        default=(3.4445, -4.7750, 2.0315), names=("a", "b", "c"), help="of the Newton-Schulz polynomial"
    )
    eps: float = number(default=1e-7, unit="gradient", help="least norm that a matrix is divided by")
    ns_steps: int = number(default=5, low=0, below=100, integer=True, help="Newton-Schulz iterations")
    adjust_lr_fn: str | None = flag(default=None, help="how the learning rate follows the shape")
    # torch.optim.Muon has none of these
    maximize = None  # type: ignore[assignment]
    foreach = None
    differentiable = None  # type: ignore[assignment]

    momentum_buffer = buffer(help="average of the gradients")

    elementwise = False
    accepts_complex = False
    matrices_only: ClassVar[bool | str] = True

    @classmethod
    def validate(cls, h: Hyper) -> None:
        _check(h)

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        _check(h)  # for a param group may have changed
        chosen = h.adjust_lr_fn or "original"
        return {
            "momentum": h.momentum,
            "one_minus_momentum": 1 - h.momentum,
            "decay": 1 - h.lr * h.weight_decay,
            **{name: h.lr if name == chosen else 0.0 for name in RATIOS},
            **{name: getattr(h, name) for name in ("a", "b", "c", "eps", "ns_steps")},
        }

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        s.momentum_buffer = lerp(s.momentum_buffer, g, k.one_minus_momentum)
        u = lerp(g, s.momentum_buffer, k.momentum) if on.nesterov else s.momentum_buffer
        lr = sum(getattr(k, name) * of_shape(ratio, p) for name, ratio in RATIOS.items())
        return p * k.decay - _orthogonalized(u, p.dtype, k.a, k.b, k.c, k.eps, k.ns_steps) * lr


def _orthogonalized(u: Value, dtype: torch.dtype, *numbers: Value) -> Value:
    # A list is rounded in other places than torch.optim, but float64 is to be equal.
    of_list = None if dtype == torch.float64 else newton_schulz_of_list
    return batched(newton_schulz, u.to(torch.bfloat16), *numbers, of_list=of_list).to(dtype)
