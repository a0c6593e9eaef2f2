"""RMSprop."""

from torch import Tensor

from compiled_optim._engine.values import add_square, lerp
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, counter, flag, number
from compiled_optim.optimizer import Optimizer


class RMSprop(Optimizer):
    r"""RMSprop (Tieleman and Hinton 2012, lecture 6.5); ``centered`` after Graves (2013, arXiv:1308.0850).

    .. math::
        v \leftarrow \alpha v + (1 - \alpha) g^2, \qquad a \leftarrow a + (1 - \alpha)(g - a), \qquad
        b \leftarrow \mu b + \frac{g}{\sqrt{v - a^2} + \epsilon}, \qquad \theta \leftarrow \theta - \gamma b

    :math:`a` is zero unless ``centered``, and :math:`\mu` is ``momentum``. ``weight_decay`` adds
    :math:`\lambda \theta` to the gradient.
    """

    lr: float | Tensor = number(default=1e-2, low=0, unit="parameter", help="learning rate")
    alpha: float = number(default=0.99, low=0, help="decay of v, and of a, per step")
    eps: float = number(default=1e-8, low=0, unit="gradient", help="keeps the quotient finite")
    weight_decay: float = number(default=0, low=0, switch=True, unit="gradient / parameter", help="L2 penalty")
    momentum: float = number(default=0, low=0, switch=True, help="decay of b per step")
    centered: bool = flag(default=False, switch=True, help="divide by the deviation from the mean gradient")
    capturable: bool = flag(default=False)
    foreach: bool | None = flag(default=None)
    maximize: bool = flag(default=False, switch=True)
    differentiable: bool = flag(default=False)

    step_count = counter()
    square_avg = buffer(help="average v of squared gradients")
    momentum_buffer = buffer(when="momentum", help="sum b of past steps")
    grad_avg = buffer(when="centered", help="average a of gradients")

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        return {
            "lr": h.lr,
            "alpha": h.alpha,
            "one_minus_alpha": 1 - h.alpha,
            "eps": h.eps,
            "momentum": h.momentum,
            "weight_decay": h.weight_decay,
        }

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        if on.weight_decay:
            g = g + p * k.weight_decay
        s.square_avg = variance = add_square(s.square_avg * k.alpha, g, k.one_minus_alpha)
        if on.centered:
            s.grad_avg = lerp(s.grad_avg, g, k.one_minus_alpha)
            # The difference of squares as a product, because either square may overflow. Rounding can make it negative.
            deviation = variance.sqrt()
            variance = ((deviation - s.grad_avg) * (deviation + s.grad_avg)).clamp_min(0)
        g = g / (variance.sqrt() + k.eps)
        if on.momentum:
            s.momentum_buffer = g = s.momentum_buffer * k.momentum + g
        return p - g * k.lr
