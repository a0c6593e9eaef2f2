"""Adafactor."""

from torch import Tensor

from compiled_optim._engine.values import add_scaled, divided, lerp, maximum, mean, mean_square, where
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, counter, number
from compiled_optim.optimizer import Optimizer


class Adafactor(Optimizer):
    r"""Adam with a factored second moment and without a first (Shazeer and Stern 2018, arXiv:1804.04235).

    .. math::
        R &\leftarrow R + t^{\beta} (\overline{g^2}^{\text{rows}} - R), \qquad
        C \leftarrow C + t^{\beta} (\overline{g^2}^{\text{columns}} - C), \qquad
        \hat v = R C / \max(\overline{R}, \epsilon_1) \\
        u &= g / \sqrt{\max(\hat v, \epsilon_1^2)} \\
        \theta &\leftarrow (1 - \gamma \lambda)\,\theta - \min(\gamma, t^{-1/2})\,
        \frac{\max(\epsilon_2, \operatorname{RMS}(\theta))}{\max(1, \operatorname{RMS}(u) / d)} \, u

    :math:`\beta` is ``beta2_decay``, :math:`\lambda` the ``weight_decay`` and :math:`\theta` under RMS the parameter
    before its decay. Parameters of two dimensions or more are factored along the last two; the others keep
    :math:`\hat v` itself. An RMS that is NaN counts as the bound it is compared with.

    Unlike in torch.optim, :math:`\epsilon_1` is that of the dtype of each parameter, not of the first in a param group,
    and an empty parameter is no error.
    """

    lr: float | Tensor = number(default=1e-2, low=0, unit="parameter / RMS of the parameter", help="largest step")
    beta2_decay: float = number(default=-0.8, high=0, help="exponent of t in the weight of a new square")
    eps: tuple[float | None, float] = number(
        default=(None, 1e-3), low=0, names=("eps1", "eps2"), help="least root of v (None: the dtype's eps), least RMS"
    )
    d: float = number(default=1.0, low=1, help="largest RMS of u")
    weight_decay: float = number(default=0.0, low=0, switch=True, unit="1 / lr", help="decay of the parameter per step")
    differentiable = None  # type: ignore[assignment]  # torch.optim.Adafactor has it not

    step_count = counter()
    row_var = buffer(of="matrices", mean_over=-1, help="mean over the last dimension of the squares")
    col_var = buffer(of="matrices", mean_over=-2, help="mean over the last but one")
    variance = buffer(of="vectors", help="second moment, of parameters of fewer than two dimensions")

    elementwise = False
    accepts_complex = False

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        eps = {"eps1": h.eps1 or 0.0, "own_eps": float(h.eps1 is None), "eps2": h.eps2}
        size = {"step_size": min(h.lr, step**-0.5), "decay": 1 - h.lr * h.weight_decay, "most": h.d}
        return {"weight": step**h.beta2_decay, **size, **eps}

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        eps1 = k.eps1 + k.own_eps * k.dtype_eps
        size = mean_square(p) ** 0.5
        if hasattr(s, "variance"):
            s.variance = lerp(s.variance, g * g, k.weight)
            root = s.variance.sqrt()
        else:
            s.row_var = lerp(s.row_var, mean_square(g, -1), k.weight)
            s.col_var = lerp(s.col_var, mean_square(g, -2), k.weight)
            # as factors, because a root of each costs less than that of each element
            root = (s.row_var / maximum(mean(s.row_var, -2), eps1)).sqrt() * s.col_var.sqrt()
        u = divided(g, root, eps1)
        excess = mean_square(u) ** 0.5 / k.most
        step_size = where(size > k.eps2, size, k.eps2) * k.step_size / where(excess > 1, excess, 1.0)
        return add_scaled(p * k.decay if on.weight_decay else p, u, -step_size)
