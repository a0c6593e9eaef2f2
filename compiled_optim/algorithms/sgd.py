"""Stochastic gradient descent."""

from torch import Tensor

from compiled_optim._engine.values import where
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, flag, number
from compiled_optim.optimizer import Optimizer


class SGD(Optimizer):
    r"""Stochastic gradient descent with momentum (Sutskever et al. 2013, as torch.optim writes it).

    .. math::
        g \leftarrow g + \lambda \theta, \qquad b \leftarrow \mu b + (1 - \tau) g, \qquad
        \theta \leftarrow \theta - \gamma \, (g + \mu b \text{ if nesterov, else } b)

    The first gradient enters the momentum buffer whole, without dampening. Sparse gradients are accepted; without
    momentum and weight decay only the rows they touch are read and written.
    """

    lr: float | Tensor = number(default=1e-3, low=0, unit="parameter / gradient", help="learning rate")
    momentum: float = number(default=0, low=0, switch=True, help="decay of b per step")
    dampening: float = number(default=0, help="share of a gradient that does not enter b")
    weight_decay: float | Tensor = number(default=0, low=0, switch=True, unit="gradient / parameter", help="L2 penalty")
    nesterov: bool = flag(default=False, switch=True, help="step by the gradient and the new b")
    fused: bool | None = flag(default=None, kw_only=True)

    momentum_buffer = buffer(when="momentum", help="sum b of past gradients")

    accepts_sparse = True

    @classmethod
    def validate(cls, h: Hyper) -> None:
        if h.nesterov and (h.momentum <= 0 or h.dampening != 0):
            raise ValueError(
                "SGD: nesterov=True needs momentum above 0 and dampening 0, "
                f"got momentum={h.momentum!r}, dampening={h.dampening!r}"
            )

    @classmethod
    def keeps_untouched_rows(cls, on: Switches) -> bool:
        return not (on.momentum or on.weight_decay)

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        # SGD's state holds no step count: step is 1 while the momentum buffer is new, and 2 afterwards.
        return {
            "lr": h.lr,
            "momentum": h.momentum,
            "gradient_weight": where(step == 1, 1, 1 - h.dampening),
            "weight_decay": h.weight_decay,
        }

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        if on.weight_decay:
            g = g + p * k.weight_decay
        if on.momentum:
            s.momentum_buffer = s.momentum_buffer * k.momentum + g * k.gradient_weight
            g = g + s.momentum_buffer * k.momentum if on.nesterov else s.momentum_buffer
        return p - g * k.lr
