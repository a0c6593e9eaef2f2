"""The update of each algorithm as a function of lists of tensors: ``torch.optim.functional`` of torch 2.15.

Parameters, state and step counts are written in place; the first state, zeros, is the caller's to make. As with torch's
functions, call them under ``torch.no_grad()``: where grad mode is on and a tensor requires grad, autograd records the
update. ``fused=True`` launches the kernel that the class has with ``compiled=True``, divides the gradients by
``grad_scale``, and does nothing if ``found_inf`` is not zero; a class plans its launch once, a function in each call.
``foreach=False`` updates one tensor after the other. ``has_complex`` and ``has_sparse_grad`` have no effect.

Raises:
    ValueError: for a list that is not as long as ``params``, and for options that do not go together.
    RuntimeError: for a step count that is no tensor, and for ``foreach`` or ``fused`` where autograd is to record.
    AssertionError: for ``grad_scale`` or ``found_inf`` without ``fused``.

Example:
    >>> import torch
    >>> from compiled_optim.functional import sgd
    >>> weight, grad = torch.ones(2), torch.tensor([1.0, -1.0])
    >>> buffers = [None]
    >>> options = {"weight_decay": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
    >>> sgd([weight], [grad], buffers, lr=0.5, momentum=0.9, **options)
    >>> weight.tolist(), buffers[0].tolist()
    ([0.5, 1.5], [1.0, -1.0])
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

from compiled_optim import algorithms
from compiled_optim._engine.executions.functional import Functional
from compiled_optim._engine.torch_private import dynamo
from compiled_optim.optimizer import Optimizer

__all__ = [
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "muon",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "sparse_adam",
]

P = ParamSpec("P")
_Tensors = list[Tensor]
_Maybe = list[Tensor | None]


def _updates(cls: type[Optimizer], *, counts: bool = True) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Makes of a signature of torch the function that runs the rule of ``cls``; ``counts``: see `Functional`."""

    def decorate(declared: Callable[P, None]) -> Callable[P, None]:
        run = Functional(cls.rule, inspect.signature(declared), counts)

        @dynamo.never_traced  # which imports Dynamo
        def outside_graphs(*args: P.args, **options: P.kwargs) -> None:
            run(*args, **options)

        @functools.wraps(declared)
        def function(*args: P.args, **options: P.kwargs) -> None:
            (outside_graphs if torch.compiler.is_compiling() else run)(*args, **options)

        return function

    return decorate


@_updates(algorithms.Adadelta)
def adadelta(
    params: _Tensors,
    grads: _Tensors,
    square_avgs: _Tensors,
    acc_deltas: _Tensors,
    state_steps: _Tensors,
    capturable: bool = False,
    foreach: bool | None = None,
    differentiable: bool = False,
    has_complex: bool = False,
    *,
    lr: float | Tensor,
    rho: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step of `compiled_optim.Adadelta`, which documents the formula and its paper."""


@_updates(algorithms.Adafactor)
def adafactor(
    params: _Tensors,
    grads: _Tensors,
    row_vars: _Maybe,
    col_vars: _Maybe,
    variances: _Maybe,
    state_steps: _Tensors,
    foreach: bool | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    has_complex: bool = False,
    *,
    d: float,
    lr: float | Tensor,
    beta2_decay: float,
    weight_decay: float,
    eps1: float,
    eps2: float,
    maximize: bool,
) -> None:
    """One step of `compiled_optim.Adafactor`, which documents the formula and its paper."""


@_updates(algorithms.Adagrad)
def adagrad(
    params: _Tensors,
    grads: _Tensors,
    state_sums: _Tensors,
    state_steps: _Tensors,
    fused: bool | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    has_sparse_grad: bool = False,
    foreach: bool | None = None,
    differentiable: bool = False,
    has_complex: bool = False,
    *,
    lr: float | Tensor,
    weight_decay: float,
    lr_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    """One step of `compiled_optim.Adagrad`, which documents the formula and its paper."""


@_updates(algorithms.Adam)
def adam(
    params: _Tensors,
    grads: _Tensors,
    exp_avgs: _Tensors,
    exp_avg_sqs: _Tensors,
    max_exp_avg_sqs: _Tensors,
    state_steps: _Tensors,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    has_complex: bool = False,
    decoupled_weight_decay: bool = False,
    *,
    amsgrad: bool,
    beta1: float | Tensor,
    beta2: float | Tensor,
    lr: float | Tensor,
    weight_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    """One step of `compiled_optim.Adam`, which documents the formula and its paper."""


@_updates(algorithms.Adamax)
def adamax(
    params: _Tensors,
    grads: _Tensors,
    exp_avgs: _Tensors,
    exp_infs: _Tensors,
    state_steps: _Tensors,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    capturable: bool = False,
    has_complex: bool = False,
    *,
    eps: float,
    beta1: float,
    beta2: float,
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """One step of `compiled_optim.Adamax`, which documents the formula and its paper."""


@_updates(algorithms.AdamW)
def adamw(
    params: _Tensors,
    grads: _Tensors,
    exp_avgs: _Tensors,
    exp_avg_sqs: _Tensors,
    max_exp_avg_sqs: _Tensors,
    state_steps: _Tensors,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    has_complex: bool = False,
    *,
    amsgrad: bool,
    beta1: float | Tensor,
    beta2: float | Tensor,
    lr: float | Tensor,
    weight_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    """One step of `compiled_optim.AdamW`, which documents the formula and its paper."""


@_updates(algorithms.ASGD)
def asgd(
    params: _Tensors,
    grads: _Tensors,
    axs: _Tensors,
    mus: _Tensors,
    etas: _Tensors,
    state_steps: _Tensors,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    capturable: bool = False,
    has_complex: bool = False,
    *,
    lambd: float,
    lr: float | Tensor,
    t0: float,
    alpha: float,
    weight_decay: float,
) -> None:
    """One step of `compiled_optim.ASGD`, which documents the formula and its paper."""


@_updates(algorithms.Muon)
def muon(
    params: _Tensors,
    grads: _Tensors,
    muon_momentum_bufs: _Tensors,
    *,
    foreach: bool | None = None,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    ns_steps: int,
    eps: float,
    adjust_lr_fn: str | None,
    has_complex: bool,
) -> None:
    """One step of `compiled_optim.Muon`, which documents the formula and its paper."""


@_updates(algorithms.NAdam)
def nadam(
    params: _Tensors,
    grads: _Tensors,
    exp_avgs: _Tensors,
    exp_avg_sqs: _Tensors,
    mu_products: _Tensors,
    state_steps: _Tensors,
    decoupled_weight_decay: bool = False,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    has_complex: bool = False,
    maximize: bool = False,
    *,
    beta1: float,
    beta2: float,
    lr: float | Tensor,
    weight_decay: float,
    momentum_decay: float,
    eps: float,
) -> None:
    """One step of `compiled_optim.NAdam`, which documents the formula and its paper."""


@_updates(algorithms.RAdam)
def radam(
    params: _Tensors,
    grads: _Tensors,
    exp_avgs: _Tensors,
    exp_avg_sqs: _Tensors,
    state_steps: _Tensors,
    decoupled_weight_decay: bool = False,
    foreach: bool | None = None,
    differentiable: bool = False,
    capturable: bool = False,
    has_complex: bool = False,
    maximize: bool = False,
    *,
    beta1: float,
    beta2: float,
    lr: float,
    weight_decay: float,
    eps: float,
) -> None:
    """One step of `compiled_optim.RAdam`, which documents the formula and its paper."""


@_updates(algorithms.RMSprop)
def rmsprop(
    params: _Tensors,
    grads: _Tensors,
    square_avgs: _Tensors,
    grad_avgs: _Tensors,
    momentum_buffer_list: _Tensors,
    state_steps: _Tensors,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    capturable: bool = False,
    has_complex: bool = False,
    *,
    lr: float | Tensor,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
) -> None:
    """One step of `compiled_optim.RMSprop`, which documents the formula and its paper."""


@_updates(algorithms.Rprop)
def rprop(
    params: _Tensors,
    grads: _Tensors,
    prevs: _Tensors,
    step_sizes: _Tensors,
    state_steps: _Tensors,
    foreach: bool | None = None,
    capturable: bool = False,
    maximize: bool = False,
    differentiable: bool = False,
    has_complex: bool = False,
    *,
    step_size_min: float,
    step_size_max: float,
    etaminus: float,
    etaplus: float,
) -> None:
    """One step of `compiled_optim.Rprop`, which documents the formula and its paper."""


@_updates(algorithms.SGD)
def sgd(
    params: _Tensors,
    d_p_list: _Tensors,
    momentum_buffer_list: _Maybe,
    has_sparse_grad: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    weight_decay: float,
    momentum: float,
    lr: float | Tensor,
    dampening: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """One step of `compiled_optim.SGD`, which documents the formula and its paper."""


@_updates(algorithms.SparseAdam, counts=False)
def sparse_adam(
    params: _Tensors,
    grads: _Tensors,
    exp_avgs: _Tensors,
    exp_avg_sqs: _Tensors,
    state_steps: list[int],
    *,
    eps: float,
    beta1: float,
    beta2: float,
    lr: float,
    maximize: bool,
) -> None:
    """One step of `compiled_optim.SparseAdam`, which documents the formula and its paper."""
