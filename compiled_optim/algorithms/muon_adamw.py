"""Muon and AdamW as one optimizer."""

import re
from typing import Any

from torch import Tensor

from compiled_optim.algorithms.adam import AdamW
from compiled_optim.algorithms.muon import Muon
from compiled_optim.declare import Hyper, Scalars, State, Switches, Value, buffer, counter, flag, number

# A name of one of these is that of an embedding or of an output layer.
NOT_HIDDEN = re.compile(
    r"embed|(^|[._])(emb|wte|wpe)([._]|$)|(^|\.)(lm_head|head|classifier|score)([.]|$)", re.IGNORECASE
)


class MuonAdamW(Muon):
    r"""Muon for the matrices of hidden layers, AdamW for the rest (Liu et al. 2025, arXiv:2502.16982).

    A param group with ``use_muon=True`` is updated as by :class:`Muon`, one with ``use_muon=False`` as by
    :class:`AdamW`. A group that says neither is split into one of each, in this order. Muon takes its matrices; given
    ``model.named_parameters()``, only those that are no embedding and no output layer by their names: ``embed`` in it,
    or a part of it that is ``emb``, ``wte``, ``wpe``, ``lm_head``, ``head``, ``classifier`` or ``score``. Without names
    all matrices are taken for hidden ones.

    With ``adjust_lr_fn="match_rms_adamw"``, the default here, both take the same ``lr`` and ``weight_decay``. For other
    values of ``adjust_lr_fn`` give each its own group, such as ``{"params": hidden, "use_muon": True, "lr": 0.02}``.
    """

    betas: tuple[float | Tensor, float | Tensor] = number(
        default=(0.9, 0.95), low=0, below=1, help="of AdamW: decay of m and of v per step"
    )
    eps: float = number(default=1e-8, low=0, unit="gradient", help="least norm or, of AdamW, added to its quotient")
    adjust_lr_fn: str | None = flag(default="match_rms_adamw", help="how Muon's learning rate follows the shape")
    use_muon: bool | None = flag(
        default=None, switch=True, kw_only=True, help="Muon or AdamW for groups that do not say; None splits them"
    )
    amsgrad: bool = flag(default=False, switch=True, init=False)
    decoupled_weight_decay: bool = flag(default=True, switch=True, init=False)

    step_count = counter()
    momentum_buffer = buffer(when="use_muon", help="average of the gradients")
    exp_avg = buffer(when="not use_muon", help="first moment m")
    exp_avg_sq = buffer(when="not use_muon", help="second moment v")

    matrices_only = "use_muon"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, or the two that one without ``use_muon`` is split into."""
        use_muon = param_group.get("use_muon", self.defaults["use_muon"])
        params = param_group["params"]
        if use_muon is not None or isinstance(params, Tensor | set):
            use_muon = use_muon if use_muon is not None else isinstance(params, Tensor) and params.dim() == 2
            super().add_param_group({**param_group, "use_muon": use_muon})
            return
        count, params = len(self.param_groups), list(params)
        hidden = [_is_hidden(p) for p in params]
        try:
            for chosen in (True, False):
                part = [p for p, is_hidden in zip(params, hidden, strict=True) if is_hidden == chosen]
                if part or (not params and chosen):
                    super().add_param_group({**param_group, "params": part, "use_muon": chosen})
        except BaseException:
            del self.param_groups[count:]
            raise

    @staticmethod
    def scalars(h: Hyper, step: Value) -> dict[str, Value]:
        return (Muon if h.use_muon else AdamW).scalars(h, step)

    @staticmethod
    def update(p: Value, g: Value, s: State, k: Scalars, on: Switches) -> Value:
        return (Muon if on.use_muon else AdamW).update(p, g, s, k, on)


def _is_hidden(listed: Any) -> bool:
    """Whether a parameter, or a pair of its name and itself, is a matrix of a hidden layer."""
    name, p = listed if isinstance(listed, tuple) else ("", listed)
    return isinstance(p, Tensor) and p.dim() == 2 and not NOT_HIDDEN.search(name)
