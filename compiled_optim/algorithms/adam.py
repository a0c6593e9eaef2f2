"""Adam and AdamW."""

from torch import Tensor

from compiled_optim._engine.values import add_square, lerp
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, counter, flag, number
from compiled_optim.optimizer import Optimizer


class Adam(Optimizer):
    r"""Adam (Kingma and Ba 2015, arXiv:1412.6980); ``amsgrad`` after Reddi, Kale and Kumar (2018).

    .. math::
        m &\leftarrow m + (1 - \beta_1)(g - m), \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \frac{\gamma}{1 - \beta_1^t} \, \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    ``weight_decay`` adds :math:`\lambda \theta` to the gradient, or with ``decoupled_weight_decay`` multiplies
    :math:`\theta` by :math:`1 - \gamma \lambda`; ``amsgrad`` replaces :math:`v` by its maximum so far.
    """

    lr: float | Tensor = number(default=1e-3, low=0, unit="parameter", help="learning rate")
    betas: tuple[float | Tensor, float | Tensor] = number(
        default=(0.9, 0.999), low=0, below=1, help="decay of m and of v per step"
    )
    eps: float = number(default=1e-8, low=0, unit="gradient", help="keeps the quotient finite")
    weight_decay: float = number(default=0, low=0, switch=True, unit="gradient / parameter", help="L2 penalty")
    amsgrad: bool = flag(default=False, switch=True, help="divide by the largest v so far")
    capturable: bool = flag(default=False, kw_only=True)
    fused: bool | None = flag(default=None, kw_only=True)
    decoupled_weight_decay: bool = flag(default=False, switch=True, kw_only=True, help="shrink the parameter itself")

    step_count = counter()
    exp_avg = buffer(help="first moment m")
    exp_avg_sq = buffer(help="second moment v")
    max_exp_avg_sq = buffer(when="amsgrad", help="largest v so far")

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        return {
            "decay": 1 - h.lr * h.weight_decay if h.decoupled_weight_decay else h.weight_decay,
            "one_minus_beta1": 1 - h.beta1,
            "beta2": h.beta2,
            "one_minus_beta2": 1 - h.beta2,
            "step_size": h.lr / (1 - h.beta1**step),
            "correction2": (1 - h.beta2**step) ** -0.5,
            "eps": h.eps,
        }

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        if on.decoupled_weight_decay:
            p = p * k.decay
        elif on.weight_decay:
            g = g + p * k.decay
        s.exp_avg = lerp(s.exp_avg, g, k.one_minus_beta1)
        s.exp_avg_sq = v = add_square(s.exp_avg_sq * k.beta2, g, k.one_minus_beta2)
        if on.amsgrad:
            s.max_exp_avg_sq = v = s.max_exp_avg_sq.maximum(v)
        return p - s.exp_avg / (v.sqrt() * k.correction2 + k.eps) * k.step_size


class AdamW(Adam):
    r"""Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101).

    .. math:: \theta \leftarrow (1 - \gamma \lambda)\,\theta

    comes before the update of :class:`Adam`, with :math:`\lambda` the ``weight_decay``.
    """

    # No switch: a group without decay multiplies by one, which is exact, and shares the kernel and its launch.
    weight_decay: float = number(default=1e-2, low=0, unit="1 / lr", help="decay of the parameter per step")
    decoupled_weight_decay: bool = flag(default=True, switch=True, init=False)
