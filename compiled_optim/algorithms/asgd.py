"""Averaged stochastic gradient descent."""

from torch import Tensor

from compiled_optim._engine.values import lerp, maximum, where
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, carried, counter, flag, number
from compiled_optim.optimizer import Optimizer


class ASGD(Optimizer):
    r"""Averaged stochastic gradient descent (Polyak and Juditsky 1992, doi:10.1137/0330046).

    .. math::
        \theta &\leftarrow (1 - \lambda \eta)\,\theta - \eta g, \qquad a \leftarrow a + \mu (\theta - a) \\
        \eta &\leftarrow \gamma \, (1 + \lambda \gamma t)^{-\alpha}, \qquad \mu \leftarrow 1 / \max(1, t - t_0)

    :math:`\lambda` is ``lambd``; the average :math:`a` is the state ``ax``. ``weight_decay`` adds a multiple of
    :math:`\theta` to the gradient.
    """

    lr: float | Tensor = number(default=1e-2, low=0, unit="parameter / gradient", help="first learning rate")
    lambd: float = number(default=1e-4, low=0, unit="1 / lr", help="decay of the parameter and of the learning rate")
    alpha: float = number(default=0.75, low=0, help="power by which the learning rate falls")
    t0: float = number(default=1e6, unit="step", help="where averaging begins")
    weight_decay: float = number(default=0, low=0, switch=True, unit="gradient / parameter", help="L2 penalty")
    foreach: bool | None = flag(default=None)
    maximize: bool = flag(default=False, switch=True)
    differentiable: bool = flag(default=False)
    capturable: bool = flag(default=False)

    step_count = counter()
    eta = carried(initial="lr", help="learning rate of the next step")
    mu = carried(initial=1.0, help="weight of the next parameter in the average")
    ax = buffer(help="averaged parameter")

    @staticmethod
    def scalars(h: Hyper, step: Value, s: State) -> dict[str, Value]:
        values = {
            "shrink": 1 - h.lambd * s.eta,
            "eta": s.eta,
            "mu": s.mu,
            "weight_decay": h.weight_decay,
        }
        s.eta = h.lr / (1 + h.lambd * h.lr * step) ** h.alpha
        s.mu = 1 / maximum(step - h.t0, 1)
        return values

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        if on.weight_decay:
            g = g + p * k.weight_decay
        p = p * k.shrink - g * k.eta
        # While mu is 1 the average is the parameter, whatever it was before: that may not be finite.
        s.ax = where(k.mu < 1, lerp(s.ax, p, k.mu), p)
        return p
