"""RAdam."""

from torch import Tensor

from compiled_optim._engine.values import add_square, lerp, maximum, where
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, counter, flag, number
from compiled_optim.optimizer import Optimizer


class RAdam(Optimizer):
    r"""Adam with the variance of its adaptive step rectified (Liu et al. 2020, arXiv:1908.03265).

    .. math::
        m &\leftarrow m + (1 - \beta_1)(g - m), \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \rho_\infty &= \tfrac{2}{1 - \beta_2} - 1, \qquad \rho = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t} \\
        \theta &\leftarrow \theta - \frac{\gamma \, m}{1 - \beta_1^t} \cdot \begin{cases}
        \sqrt{\frac{(\rho - 4)(\rho - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2) \rho}} \,
        \frac{\sqrt{1 - \beta_2^t}}{\sqrt{v} + \epsilon} & \text{if } \rho > 5 \\ 1 & \text{otherwise} \end{cases}

    ``weight_decay`` adds :math:`\lambda \theta` to the gradient, or with ``decoupled_weight_decay`` multiplies
    :math:`\theta` by :math:`1 - \gamma \lambda`.
    """

    lr: float | Tensor = number(default=1e-3, low=0, unit="parameter", help="learning rate")
    betas: tuple[float, float] = number(default=(0.9, 0.999), low=0, below=1, help="decay of m and of v per step")
    eps: float = number(default=1e-8, low=0, unit="gradient", help="keeps the quotient finite")
    weight_decay: float = number(default=0, low=0, switch=True, unit="gradient / parameter", help="L2 penalty")
    decoupled_weight_decay: bool = flag(default=False, switch=True, help="shrink the parameter itself")
    capturable: bool = flag(default=False, kw_only=True)

    step_count = counter()
    exp_avg = buffer(help="first moment m")
    exp_avg_sq = buffer(help="second moment v")

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        correction2 = 1 - h.beta2**step
        limit = 2 / (1 - h.beta2) - 1
        rho = limit - 2 * step * h.beta2**step / correction2
        rectified = rho > 5
        # Clamped away from their poles. Where the clamp acts, neither is used.
        r, top = maximum(rho, 5), maximum(limit, 5)
        rectification = ((r - 4) * (r - 2) * top / ((top - 4) * (top - 2) * r) * correction2) ** 0.5
        return {
            "decay": 1 - h.lr * h.weight_decay if h.decoupled_weight_decay else h.weight_decay,
            "one_minus_beta1": 1 - h.beta1,
            "beta2": h.beta2,
            "one_minus_beta2": 1 - h.beta2,
            "step_size": h.lr / (1 - h.beta1**step),
            "rectification": where(rectified, rectification, 0.0),
            "eps": h.eps,
        }

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        if on.decoupled_weight_decay:
            p = p * k.decay
        elif on.weight_decay:
            g = g + p * k.decay
        s.exp_avg = lerp(s.exp_avg, g, k.one_minus_beta1)
        s.exp_avg_sq = add_square(s.exp_avg_sq * k.beta2, g, k.one_minus_beta2)
        rectified = s.exp_avg / (s.exp_avg_sq.sqrt() + k.eps) * k.rectification
        return p - where(k.rectification > 0, rectified, s.exp_avg) * k.step_size
