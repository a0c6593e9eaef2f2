"""NAdam."""

from torch import Tensor

from compiled_optim._engine.values import add_square, lerp
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, carried, counter, flag, number
from compiled_optim.optimizer import Optimizer


class NAdam(Optimizer):
    r"""Adam with Nesterov momentum (Dozat 2016, ICLR workshop).

    .. math::
        \mu_t &= \beta_1 (1 - \tfrac12 \, 0.96^{t \psi}), \qquad \Pi_t = \mu_1 \cdots \mu_t \\
        m &\leftarrow m + (1 - \beta_1)(g - m), \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \gamma \left(\frac{1 - \mu_t}{1 - \Pi_t} g + \frac{\mu_{t+1}}{1 - \Pi_{t+1}} m
        \right) \Big/ \left(\sqrt{v / (1 - \beta_2^t)} + \epsilon\right)

    :math:`\psi` is ``momentum_decay``. ``weight_decay`` adds :math:`\lambda \theta` to the gradient, or with
    ``decoupled_weight_decay`` multiplies :math:`\theta` by :math:`1 - \gamma \lambda`.
    """

    lr: float | Tensor = number(default=2e-3, low=0, unit="parameter", help="learning rate")
    betas: tuple[float, float] = number(default=(0.9, 0.999), low=0, below=1, help="decay of m and of v per step")
    eps: float = number(default=1e-8, low=0, unit="gradient", help="keeps the quotient finite")
    weight_decay: float = number(default=0, low=0, switch=True, unit="gradient / parameter", help="L2 penalty")
    momentum_decay: float = number(default=4e-3, low=0, unit="1 / step", help="how fast the momentum rises to beta1")
    decoupled_weight_decay: bool = flag(default=False, switch=True, help="shrink the parameter itself")
    capturable: bool = flag(default=False, kw_only=True)

    step_count = counter()
    mu_product = carried(initial=1.0, help="product of all momenta so far")
    exp_avg = buffer(help="first moment m")
    exp_avg_sq = buffer(help="second moment v")

    @staticmethod
    def scalars(h: Hyper, step: Value, s: State) -> dict[str, Value]:
        mu, mu_next = (h.beta1 * (1 - 0.5 * 0.96 ** (t * h.momentum_decay)) for t in (step, step + 1))
        s.mu_product = s.mu_product * mu
        return {
            "decay": 1 - h.lr * h.weight_decay if h.decoupled_weight_decay else h.weight_decay,
            "one_minus_beta1": 1 - h.beta1,
            "beta2": h.beta2,
            "one_minus_beta2": 1 - h.beta2,
            "correction2": (1 - h.beta2**step) ** -0.5,
            "gradient_step": h.lr * (1 - mu) / (1 - s.mu_product),
            "momentum_step": h.lr * mu_next / (1 - s.mu_product * mu_next),
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
        step = g * k.gradient_step + s.exp_avg * k.momentum_step
        return p - step / (s.exp_avg_sq.sqrt() * k.correction2 + k.eps)
