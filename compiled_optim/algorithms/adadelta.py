"""Adadelta."""

from torch import Tensor

from compiled_optim._engine.values import add_square
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, counter, flag, number
from compiled_optim.optimizer import Optimizer


class Adadelta(Optimizer):
    r"""Adadelta (Zeiler 2012, arXiv:1212.5701).

    .. math::
        v &\leftarrow \rho v + (1 - \rho) g^2, \qquad
        \Delta = \frac{\sqrt{u + \epsilon}}{\sqrt{v + \epsilon}} \, g \\
        u &\leftarrow \rho u + (1 - \rho) \Delta^2, \qquad \theta \leftarrow \theta - \gamma \Delta

    ``weight_decay`` adds :math:`\lambda \theta` to the gradient.
    """

    lr: float | Tensor = number(default=1.0, low=0, help="factor of each step")
    rho: float = number(default=0.9, low=0, high=1, help="decay of u and of v per step")
    eps: float = number(default=1e-6, low=0, help="keeps the quotient finite, and the first steps from zero")
    weight_decay: float = number(default=0, low=0, switch=True, unit="gradient / parameter", help="L2 penalty")
    foreach: bool | None = flag(default=None)
    capturable: bool = flag(default=False, kw_only=True)

    step_count = counter()
    square_avg = buffer(help="average v of squared gradients")
    acc_delta = buffer(help="average u of squared updates")

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        return {"lr": h.lr, "rho": h.rho, "one_minus_rho": 1 - h.rho, "eps": h.eps, "weight_decay": h.weight_decay}

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        if on.weight_decay:
            g = g + p * k.weight_decay
        s.square_avg = add_square(s.square_avg * k.rho, g, k.one_minus_rho)
        delta = (s.acc_delta + k.eps).sqrt() / (s.square_avg + k.eps).sqrt() * g
        s.acc_delta = add_square(s.acc_delta * k.rho, delta, k.one_minus_rho)
        return p - delta * k.lr
