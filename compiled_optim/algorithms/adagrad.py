"""Adagrad."""

from torch import Tensor

from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, counter, flag, number
from compiled_optim.optimizer import Optimizer


class Adagrad(Optimizer):
    r"""Adagrad (Duchi, Hazan and Singer 2011, JMLR 12).

    .. math::
        v \leftarrow v + g^2, \qquad
        \theta \leftarrow \theta - \frac{\gamma}{1 + (t - 1) \eta} \, \frac{g}{\sqrt{v} + \epsilon}

    :math:`\eta` is ``lr_decay``, :math:`v` begins at ``initial_accumulator_value``, and ``weight_decay`` adds
    :math:`\lambda \theta` to the gradient. With a sparse gradient, only the rows it touches are read and written.
    """

    lr: float | Tensor = number(default=1e-2, low=0, unit="parameter", help="learning rate")
    lr_decay: float = number(default=0, low=0, unit="1 / step", help="how fast the learning rate falls")
    weight_decay: float = number(default=0, low=0, switch=True, unit="gradient / parameter", help="L2 penalty")
    initial_accumulator_value: float = number(default=0, low=0, unit="gradient²", help="first value of v")
    eps: float = number(default=1e-10, low=0, unit="gradient", help="keeps the quotient finite")
    foreach: bool | None = flag(default=None)
    fused: bool | None = flag(default=None, kw_only=True)

    step_count = counter()
    sum = buffer(initial="initial_accumulator_value", help="sum v of squared gradients")

    accepts_sparse = True
    state_at_construction = True

    @classmethod
    def keeps_untouched_rows(cls, on: Switches) -> bool:
        if on.weight_decay:
            raise RuntimeError("Adagrad: weight_decay must be 0 for sparse gradients")
        return True

    def share_memory(self) -> None:
        """Moves the accumulators to shared memory."""
        for state in self.state.values():
            state["sum"].share_memory_()

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        return {"step_size": h.lr / (1 + (step - 1) * h.lr_decay), "eps": h.eps, "weight_decay": h.weight_decay}

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        if on.weight_decay:
            g = g + p * k.weight_decay
        s.sum = s.sum + g * g
        return p - g / (s.sum.sqrt() + k.eps) * k.step_size
