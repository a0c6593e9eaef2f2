"""Adamax."""

from torch import Tensor

from compiled_optim._engine.values import lerp
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, counter, flag, number
from compiled_optim.optimizer import Optimizer


class Adamax(Optimizer):
    r"""Adam with the second moment replaced by a decayed maximum (Kingma and Ba 2015, arXiv:1412.6980, section 7).

    .. math::
        m \leftarrow m + (1 - \beta_1)(g - m), \qquad u \leftarrow \max(\beta_2 u, |g| + \epsilon), \qquad
        \theta \leftarrow \theta - \frac{\gamma}{1 - \beta_1^t} \, \frac{m}{u}

    ``weight_decay`` adds :math:`\lambda \theta` to the gradient.
    """

    lr: float | Tensor = number(default=2e-3, low=0, unit="parameter", help="learning rate")
    betas: tuple[float, float] = number(default=(0.9, 0.999), low=0, below=1, help="decay of m and of u per step")
    eps: float = number(default=1e-8, low=0, unit="gradient", help="keeps the quotient finite")
    weight_decay: float = number(default=0, low=0, switch=True, unit="gradient / parameter", help="L2 penalty")
    foreach: bool | None = flag(default=None)
    capturable: bool = flag(default=False, kw_only=True)

    step_count = counter()
    exp_avg = buffer(help="first moment m")
    exp_inf = buffer(help="decayed maximum u of the gradient")

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        return {
            "one_minus_beta1": 1 - h.beta1,
            "beta2": h.beta2,
            "step_size": h.lr / (1 - h.beta1**step),
            "eps": h.eps,
            "weight_decay": h.weight_decay,
        }

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        if on.weight_decay:
            g = g + p * k.weight_decay
        s.exp_avg = lerp(s.exp_avg, g, k.one_minus_beta1)
        s.exp_inf = (s.exp_inf * k.beta2).maximum(g.abs() + k.eps)
        return p - s.exp_avg / s.exp_inf * k.step_size
