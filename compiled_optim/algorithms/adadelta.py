"""Adadelta."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compiled_optim._engine.values import add_square
from compiled_optim.declare import buffer, counter, flag, number
from compiled_optim.optimizer import Optimizer


class Adadelta(Optimizer):
    r"""Adadelta (Zeiler 2012, arXiv:1212.5701).

    .. math::
        v &\leftarrow \rho v + (1 - \rho) g^2, \qquad
        \Delta = \frac{\sqrt{u + \epsilon}}{\sqrt{v + \epsilon}} \, g \\
        u &\leftarrow \rho u + (1 - \rho) \Delta^2, \qquad \theta \leftarrow \theta - \gamma \Delta

    ``weight_decay`` adds :math:`\lambda \theta` to the gradient.
    """

    lr: float | Tensor = number(default=1.0, low=0)
    rho: float = number(default=0.9, low=0, high=1)
    eps: float = number(default=1e-6, low=0)
    weight_decay: float = number(default=0, low=0, switch=True)
    foreach: bool | None = flag(default=None)
    capturable: bool = flag(default=False, kw_only=True)

    step_count = counter()
    square_avg = buffer()
    acc_delta = buffer()

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr, "rho": h.rho, "one_minus_rho": 1 - h.rho, "eps": h.eps, "weight_decay": h.weight_decay}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        if on.weight_decay:
            g = g + p * k.weight_decay
        s.square_avg = add_square(s.square_avg * k.rho, g, k.one_minus_rho)
        delta = (s.acc_delta + k.eps).sqrt() / (s.square_avg + k.eps).sqrt() * g
        s.acc_delta = add_square(s.acc_delta * k.rho, delta, k.one_minus_rho)
        return p - delta * k.lr
