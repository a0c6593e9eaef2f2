"""SparseAdam."""

from typing import Any

from torch import Tensor

from compiled_optim._engine.values import add_square, lerp
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, counter, flag, number
from compiled_optim.optimizer import Optimizer


class SparseAdam(Optimizer):
    r"""Adam on the rows that a sparse gradient touches (:class:`Adam`; Kingma and Ba 2015, arXiv:1412.6980).

    .. math::
        m \leftarrow m + (1 - \beta_1)(g - m), \qquad v \leftarrow v + (1 - \beta_2)(g^2 - v), \qquad
        \theta \leftarrow \theta - \gamma \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m}{\sqrt{v} + \epsilon}

    Gradients must be sparse COO tensors, coalesced or not. The other rows and their moments are neither read nor
    written; :math:`t` counts the steps of the whole parameter.
    """

    lr: float | Tensor = number(default=1e-3, above=0, unit="parameter", help="learning rate")
    betas: tuple[float, float] = number(default=(0.9, 0.999), low=0, below=1, help="decay of m and of v per step")
    eps: float = number(default=1e-8, above=0, unit="gradient", help="keeps the quotient finite")
    maximize: bool = flag(default=False, switch=True)
    foreach = None  # torch.optim.SparseAdam has neither this
    differentiable = None  # type: ignore[assignment]  # nor this

    step_count = counter()
    exp_avg = buffer(help="first moment m")
    exp_avg_sq = buffer(help="second moment v")

    accepts_sparse = True
    accepts_dense = False

    @classmethod
    def keeps_untouched_rows(cls, on: Switches) -> bool:
        return True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as in torch.optim; raises ValueError for sparse or complex parameters."""
        super().add_param_group(param_group)
        for i, p in enumerate(self.param_groups[-1]["params"]):
            if p.is_sparse or p.is_complex():
                del self.param_groups[-1]
                kind = "sparse" if p.is_sparse else "complex"
                raise ValueError(f"SparseAdam: params must be dense and real, got a {kind} one at index {i} of a group")

    def state_dict(self) -> dict[str, Any]:
        """The state as torch.optim's lays it out: the step count is an int here."""
        packed = super().state_dict()
        state = {k: {**s, "step": int(s["step"])} if "step" in s else s for k, s in packed["state"].items()}
        return {**packed, "state": state}

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        return {
            "one_minus_beta1": 1 - h.beta1,
            "beta2": h.beta2,
            "one_minus_beta2": 1 - h.beta2,
            "step_size": h.lr * (1 - h.beta2**step) ** 0.5 / (1 - h.beta1**step),
            "eps": h.eps,
        }

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        s.exp_avg = lerp(s.exp_avg, g, k.one_minus_beta1)
        s.exp_avg_sq = add_square(s.exp_avg_sq * k.beta2, g, k.one_minus_beta2)
        return p - s.exp_avg / (s.exp_avg_sq.sqrt() + k.eps) * k.step_size
