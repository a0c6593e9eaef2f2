"""``LBFGS``: the outer loop, which is torch's; its vector work is in history.py."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from compiled_optim._engine import by_name
from compiled_optim._engine.fallback import COMPILE_ERRORS, Fallback
from compiled_optim._engine.in_graph import operators
from compiled_optim._engine.torch_private import dynamo, optim, tensor_parts
from compiled_optim.lbfgs import checks
from compiled_optim.lbfgs.history import DTYPES, History, Kernels
from compiled_optim.optimizer import Optimizer

T = TypeVar("T")


class LBFGS(torch.optim.LBFGS, Optimizer):
    """Limited-memory BFGS: torch.optim.LBFGS, with the update of its history and the direction compiled.

    D. C. Liu and J. Nocedal, "On the limited memory BFGS method for large scale optimization", Math. Programming 45,
    1989; J. Nocedal and S. Wright, "Numerical Optimization", 2nd ed., chapter 7.

    The history of n real elements takes up to 2 * (history_size + 1) * n of them: twice what iterations have filled.

    Args:
        params: parameters of one device, in one param group; complex ones count as pairs of reals.
        lr: factor of the step, or the first one that a line search tries; at least 0; default: 1.
        max_iter: iterations in one step; default: 20.
        max_eval: calls of the closure after which a step begins no iteration; default: ``max_iter * 1.25``.
        tolerance_grad: a step ends at a gradient that has no element above this; default: 1e-07.
        tolerance_change: a step ends when the loss, or every parameter, changes by less than this; default: 1e-09.
        history_size: how many pairs of changes of gradient and parameters are kept; default: 100.
        line_search_fn: None or ``"strong_wolfe"``.
        maximize: ascend instead of descend; torch.optim has this since torch 2.14.
        compiled: False works as torch does. True compiles the vector work for float32 and float64 on the CPU.

    Raises:
        ValueError: for an argument out of its range; the message names argument, value and range.
        TypeError: for one that is no number.
        RuntimeError: for an unknown line search.

    Example:
        >>> import torch
        >>> from compiled_optim import LBFGS
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = LBFGS([x], line_search_fn="strong_wolfe", compiled=True)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (x - 1).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item()
        13.0
        >>> [round(v, 3) for v in x.tolist()]
        [1.0, 1.0]
    """

    _compiled: bool = False
    _execution: _Execution | None = None  # type: ignore[assignment]  # made by the first step, and again after a copy
    _inputs: Any = None  # of the user's graphs

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        maximize: bool = False,
        compiled: bool = False,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "max_iter": max_iter, "max_eval": 0 if max_eval is None else max_eval}
        options |= {"tolerance_grad": tolerance_grad, "tolerance_change": tolerance_change}
        options = checks.options({**options, "history_size": history_size, "line_search_fn": line_search_fn})
        if compiled not in (False, True):
            raise ValueError(f"LBFGS: compiled must be False or True, got {compiled!r}")
        super().__init__(params, **{**options, "max_eval": None if max_eval is None else options["max_eval"]})
        if maximize or "maximize" in self.defaults:  # older torch has no such option, and its groups are like torch's
            self.defaults["maximize"] = self.param_groups[0]["maximize"] = bool(maximize)
        self._compiled = bool(compiled)
        self._inputs = operators.inputs_of(self)

    def step(self, closure: Callable[[], T]) -> T:  # type: ignore[override]
        """Performs up to ``max_iter`` iterations.

        Args:
            closure: reevaluates the model, computes the gradients and returns the loss.

        Returns:
            The first loss of ``closure``.
        """
        if torch.compiler.is_compiling():
            return _step_outside_graphs(self, closure)  # type: ignore[no-any-return]
        return self._run_step(closure)  # type: ignore[no-any-return]

    step.hooked = True  # type: ignore[attr-defined]  # or torch wraps it, and torch.compile traces the wrapper
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # so do schedulers; they need `_opt_called`

    def _run_step(self, closure: Any) -> Any:
        self._opt_called = True
        # A step overridden in a subclass was wrapped by torch, which has run the hooks.
        return _observed_step(self, closure) if type(self).step is LBFGS.step else self._step(closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        self._params = self.param_groups[0]["params"]  # torch's parts read this, and others may have been swapped in
        if any(map(tensor_parts.is_dtensor, self._params)):
            raise RuntimeError(
                "LBFGS does not support DTensor parameters: it takes products of whole vectors, and a process holds a "
                "shard only; use an elementwise optimizer, such as AdamW, or a model that is not sharded"
            )
        closure = torch.enable_grad()(closure)
        if len(self.param_groups) != 1:
            raise ValueError(f"LBFGS: expected one param group, got {len(self.param_groups)}")
        options = checks.options(self.param_groups[0])
        if not self._params:  # as in torch.optim since torch 2.14
            return closure()
        lr = options["lr"].reshape(()) if isinstance(options["lr"], Tensor) else options["lr"]
        max_iter, max_eval, search = options["max_iter"], options["max_eval"], options["line_search_fn"]
        tolerance_grad, tolerance_change = options["tolerance_grad"], options["tolerance_change"]

        first_loss = closure()
        loss, evaluations = self._sign() * float(first_loss), 1
        g = self._gather_flat_grad()
        # What can raise comes before anything is changed; strict mode does.
        self._real_params()
        work, largest = self._choose_work(g), _largest(g)
        state = self._checked_state(g, options["history_size"])
        self.state[self._params[0]] = state
        if largest <= tolerance_grad:
            return first_loss
        history: History = state["history"]

        # The state is complete whenever the closure is called, so that training can go on after one that raised.
        n_iter = 0
        while n_iter < max_iter:
            n_iter += 1
            if state["n_iter"] > 0:
                work.update(history, g, state["prev_flat_grad"], state["d"], state["t"])
            d, gtd = work.direction(history, g)
            t: Any = 1.0 if state["n_iter"] > 0 else min(1.0, 1.0 / g.abs().sum())
            t = t * lr
            state.update(n_iter=state["n_iter"] + 1, d=d, t=t, prev_flat_grad=g, prev_loss=loss)
            if gtd > -tolerance_change:
                break

            calls = 0
            if search is not None:
                state["t"] = 0.0  # while nothing has moved
                evaluate = functools.partial(self._directional_evaluate, closure)
                loss, g, t, calls = optim.strong_wolfe(
                    *(evaluate, self._clone_param(), t, d, loss, g, gtd),  # type: ignore[no-untyped-call]
                    max_ls=max_eval - evaluations,
                )
                state["t"] = t
            self._add_grad(t, d)
            if search is None and n_iter != max_iter:
                loss, calls = self._sign() * float(closure()), 1
                g = self._gather_flat_grad()
            evaluations += calls
            state["func_evals"] += calls

            if (
                evaluations >= max_eval
                or _largest(g) <= tolerance_grad
                or _largest(d) * abs(t) <= tolerance_change
                or abs(loss - state["prev_loss"]) < tolerance_change
            ):
                break
        return first_loss

    def _choose_work(self, g: Tensor) -> Kernels | type[History]:
        """Whose ``update`` and ``direction`` to call with a history."""
        if not self._compiled:
            return History
        self._execution = self._execution or _Execution()
        return self._execution.kernels_for(g) or History

    def _checked_state(self, g: Tensor, size: int) -> dict[str, Any]:
        """A copy of the state with one more evaluation, and a history of ``size`` pairs that takes vectors like ``g``.

        The history is made at first, and anew from lists after loading, and when its size or the gradient's dtype or
        device has changed.

        Raises:
            ValueError: for state that a step cannot go on from.
        """
        old: Any = self.state.get(self._params[0], {})
        checks.check_state(old, g.numel())
        state: dict[str, Any] = {"n_iter": 0, **old, "func_evals": old.get("func_evals", 0) + 1}
        history = state.get("history")
        kept = history is not None and (history.size, history.ro.dtype, history.ro.device) == (size, g.dtype, g.device)
        if not kept or state["n_iter"] == 0:
            lists = state if history is None else history.lists()
            state["history"] = History.of_lists(lists if state["n_iter"] else {}, size, g)
            for name in (*checks.LISTS, "H_diag", "al"):
                state.pop(name, None)
        for name in ("d", "prev_flat_grad"):  # loading casts them to the dtype of the first parameter
            if state.get(name) is not None:
                state[name] = _plain(state[name], g)
        return state

    # ---- flat vectors and parameters; these override torch's

    def _sign(self) -> int:
        """-1 where the loss is maximized, for then that of its negative is minimized."""
        return -1 if self.param_groups[0].get("maximize") else 1

    def _gather_flat_grad(self) -> Tensor:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        for p, g in zip(self._params, grads, strict=True):
            if p.shape != g.shape:
                raise ValueError(f"LBFGS: expected a gradient of shape {tuple(p.shape)}, got {tuple(g.shape)}")
            if g.layout == torch.sparse_coo:
                tensor_parts.check_indices(g)
        dense = [g if g.layout == torch.strided else g.to_dense() for g in grads]
        reals = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in dense]
        flat = torch.cat([g.reshape(-1) for g in reals])
        return flat if self._sign() > 0 else flat.neg_()

    def _real_params(self) -> list[Tensor]:
        """The parameters, complex ones as pairs of reals; one that is lazily conjugated has no such view and raises."""
        return [torch.view_as_real(p) if p.is_complex() else p for p in self._params]

    def _add_grad(self, step_size: Any, update: Tensor) -> None:
        reals = self._real_params()
        torch._foreach_add_(reals, tensor_parts.unflatten(update, reals), alpha=float(step_size))

    def _set_param(self, params_data: list[Tensor]) -> None:
        torch._foreach_copy_(self._params, params_data)

    def _directional_evaluate(
        self, closure: Callable[[], Any], x: list[Tensor], t: Any, d: Tensor
    ) -> tuple[float, Tensor]:
        self._add_grad(t, d)
        loss, g = self._sign() * float(closure()), self._gather_flat_grad()
        self._set_param(x)  # not after an error, as in torch.optim
        return loss, g

    # ---- checkpoints and copies

    def state_dict(self) -> dict[str, Any]:
        """The state as torch.optim.LBFGS lays it out, with copies of the history; either side loads the other's."""
        live, self.state = self.state, self._state_of_torch()
        try:
            return optim.undecorated("state_dict")(self)  # type: ignore[no-any-return]
        finally:
            self.state = live

    def _state_of_torch(self) -> defaultdict[Tensor, Any]:
        states: defaultdict[Tensor, Any] = defaultdict(dict)
        for p, state in self.state.items():
            states[p] = dict(state)
            history = states[p].pop("history", None)
            if history is not None:
                states[p] |= history.lists()
                if state["n_iter"] > 1:
                    states[p]["al"] = [None] * history.size  # torch writes to it before it reads
        return states

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` of this class or of torch.optim.LBFGS returned, by the names of parameters if any.

        Raises:
            ValueError, TypeError, RuntimeError: for what no step can go on from, naming it; nothing has changed then.
        """
        checks.check_mapping("the checkpoint", state_dict)
        check = self.register_load_state_dict_pre_hook(_check_loaded)  # the last one: others may translate
        try:
            optim.undecorated("load_state_dict")(self, state_dict)
        finally:
            check.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": self._state_of_torch(), "_compiled": self._compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._params, self._numel_cache = self.param_groups[0]["params"], None
        self._inputs = self._inputs or operators.inputs_of(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes the only param group, from the constructor.

        Raises:
            ValueError: for a second one.
        """
        if self.param_groups:
            raise ValueError(
                "LBFGS: expected one param group, got a second one: it has no options of single parameters"
            )
        optim.undecorated("add_param_group")(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients, as in torch.optim."""
        if torch.compiler.is_compiling():
            operators.trace_zero_grad(self, set_to_none)
        else:
            optim.undecorated("zero_grad")(self, set_to_none)


class _Execution:
    """How the steps of one compiled optimizer run. ``reason``: why the last one ran eagerly, if it did."""

    def __init__(self) -> None:
        self.reason = ""
        self.kernels: Kernels | None = None
        self._fallback = Fallback()

    def kernels_for(self, g: Tensor) -> Kernels | None:
        self.reason = self._fallback.reason() or self._obtain(g)
        return None if self.reason else self.kernels

    def _obtain(self, g: Tensor) -> str:
        """Has the kernels for ``g``, or returns why not."""
        remedy = "build the optimizer with compiled=False"
        if type(g) is not Tensor or not g.is_cpu or g.dtype not in DTYPES:
            kind = f"{type(g).__name__} of {g.dtype} on {g.device.type}"
            reason = (
                f"L-BFGS steps eagerly: it is compiled for float32 and float64 on the CPU, and its gradient is a {kind}"
            )
            self._fallback.tell(reason, remedy)
            return reason
        if self.kernels is None or self.kernels.dtype != g.dtype:
            try:
                self.kernels = Kernels(g.dtype)
            except COMPILE_ERRORS as error:
                return self._fallback.give_up(str(error), f"repair that, or {remedy}")
        return ""


# runs the hooks and makes an entry in the profiler
_observed_step = torch.optim.Optimizer.profile_hook_step(LBFGS._step)
_step_outside_graphs = dynamo.outside_graphs(LBFGS._run_step)


def _check_loaded(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Checks a checkpoint, and puts it into the order of the parameters if both have their names."""
    (group,) = optimizer.param_groups
    sizes = [p.numel() * (2 if p.is_complex() else 1) for p in group["params"]]
    checks.check_checkpoint(state_dict, sum(sizes))
    arranged = by_name.arranged("LBFGS", [group], lambda name, shape: None, state_dict)
    if arranged is None or arranged["state"] is state_dict["state"]:
        return arranged
    (saved,) = state_dict["param_groups"]
    state = dict(state_dict["state"].get(saved["params"][0], {}))  # of all parameters, in flat vectors
    size_of = dict(zip(group["param_names"], sizes, strict=True))
    lengths = [size_of[name] for name in saved["param_names"]]

    def reordered(vector: Tensor) -> Tensor:
        parts = dict(zip(saved["param_names"], torch.split(vector, lengths), strict=True))
        return torch.cat([parts[name] for name in group["param_names"]])

    for name in ("d", "prev_flat_grad"):
        if state.get(name) is not None:
            state[name] = reordered(state[name])
    for name in checks.LISTS[:2]:
        state |= {name: [reordered(vector) for vector in state[name]]} if state.get(name) else {}
    return {**arranged, "state": {0: state} if state else {}}


def _largest(vector: Tensor) -> Tensor:
    """The largest magnitude, or NaN: 0.5 ms of a million elements, where ``abs().max()`` takes 7."""
    largest: Tensor = torch.linalg.vector_norm(vector, math.inf)
    return largest


def _plain(vector: Tensor, g: Tensor) -> Tensor:
    """``vector``, or a copy where it is not laid out as ``g``."""
    kind, like = ((type(x), x.dtype, x.device, x.is_contiguous(), x.is_neg()) for x in (vector, g))
    return vector if kind == like else torch.empty_like(g).copy_(vector)
