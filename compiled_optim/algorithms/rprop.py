"""Rprop."""

from torch import Tensor

from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, counter, flag, number
from compiled_optim.optimizer import Optimizer


class Rprop(Optimizer):
    r"""Resilient backpropagation (Riedmiller and Braun 1993, doi:10.1109/ICNN.1993.298623).

    .. math::
        \delta \leftarrow \begin{cases} \min(\eta_+ \delta, \delta_{\max}) & \text{if } g' g > 0 \\
        \max(\eta_- \delta, \delta_{\min}),\ g \leftarrow 0 & \text{if } g' g < 0 \end{cases} \qquad
        \theta \leftarrow \theta - \delta \operatorname{sign}(g), \qquad g' \leftarrow g

    ``etas`` are :math:`(\eta_-, \eta_+)`, ``step_sizes`` the bounds of :math:`\delta`, which begins at ``lr``.
    """

    lr: float | Tensor = number(default=1e-2, low=0, unit="parameter", help="first step size of every element")
    etas: tuple[float, float] = number(default=(0.5, 1.2), help="factors by which a step size shrinks and grows")
    step_sizes: tuple[float, float] = number(default=(1e-6, 50), unit="parameter", help="bounds of a step size")
    capturable: bool = flag(default=False, kw_only=True)

    step_count = counter()
    prev = buffer(help="last gradient")
    step_size = buffer(initial="lr", help="step size of each element")

    @classmethod
    def validate(cls, h: Hyper) -> None:
        if not 0 < h.eta1 < 1 < h.eta2:
            raise ValueError(f"Rprop: etas must be in (0, 1) and above 1, got {(h.eta1, h.eta2)!r}")

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        return {"shrink": h.eta1, "grow": h.eta2, "least": h.step_size1, "most": h.step_size2}

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        agreement = (g * s.prev).sign()
        turned = agreement < 0
        size = (s.step_size * k.shrink).where(turned, (s.step_size * k.grow).where(agreement > 0, s.step_size))
        s.step_size = size.maximum(k.least).minimum(k.most)
        s.prev = g = g.masked_fill(turned, 0)
        return p - g.sign() * s.step_size
