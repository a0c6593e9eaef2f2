"""One step of a rule on state that the caller holds, with the arguments of torch's functional optimizers."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.executions import lists
from compiled_optim._engine.executions.dispatch import Execution
from compiled_optim._engine.executions.memory import Memory
from compiled_optim._engine.executions.scaling import Scaling
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.rule import Rule

# The arguments of torch that are no plural of a state, and no name by which a rule knows a hyperparameter.
_STATE = {"state_steps": "step", "state_sums": "sum"}
_STATE |= {"momentum_buffer_list": "momentum_buffer", "muon_momentum_bufs": "momentum_buffer"}
_HYPER = {"etaminus": "eta1", "etaplus": "eta2", "step_size_min": "step_size1", "step_size_max": "step_size2"}


class Functional:
    """A functional optimizer.

    Args:
        signature: the arguments of torch. Those without a default that can be positional are lists: of parameters, of
            gradients, and of each state.
        counts: whether it advances the step counts. Otherwise they are numbers, which count this step already.
    """

    def __init__(self, rule: Rule, signature: inspect.Signature, counts: bool) -> None:
        arguments = signature.parameters.values()
        self._params, self._grads, *state = [
            p.name for p in arguments if p.default is p.empty and p.kind is not p.KEYWORD_ONLY
        ]
        self._state = {_STATE.get(name, name.removesuffix("s")): name for name in state}
        self._rule, self._signature, self._counts = rule, signature, counts
        self._steps = Execution(rule, True)  # for its kernels, and so that nothing is told twice

    def __call__(self, *args: Any, **options: Any) -> None:
        bound = self._signature.bind(*args, **options)
        bound.apply_defaults()
        given = bound.arguments
        if not self._counts:
            given["state_steps"] = [
                torch.tensor(float(n) - 1, dtype=torch.float64, device="cpu") for n in given["state_steps"]
            ]
        params, grads = given[self._params], given[self._grads]
        held = {self._params, self._grads, *self._state.values()}
        group = self._group({_HYPER.get(name, name): value for name, value in given.items() if name not in held})
        state = self._checked_state(given, group, params)
        scaling = Scaling(given.get("grad_scale"), given.get("found_inf"))
        fused, scaled = bool(given.get("fused")), scaling != (None, None)
        if scaled and not fused:
            raise AssertionError("grad_scale and found_inf must be None without fused=True, as in torch.optim")
        numbers = [v for v in given.values() if isinstance(v, Tensor)]
        records = torch.is_grad_enabled() and any(
            t.requires_grad for t in chain(params, grads, numbers, *state.values()) if t is not None
        )
        for i, p in enumerate(params if records else ()):
            if p.requires_grad and p.is_leaf:
                raise RuntimeError(f"params[{i}] is a leaf that requires grad: call this under torch.no_grad()")
            if any(p is other for other in params[:i]):
                raise RuntimeError(f"params[{i}] is given twice, and autograd can record one update only")
        if (records or given.get("differentiable")) and (fused or given.get("foreach")):
            chosen = "fused=True" if fused else "foreach=True"
            raise RuntimeError(f"{chosen} records no graph: leave it out, or call this under torch.no_grad()")
        # Of one parameter that is given twice, each has state of its own.
        own = params if records else [p.detach() for p in params]
        group["params"], states = own, defaultdict[Tensor, Any](dict)
        for i, p in enumerate(own):
            states[p] = {name: values[i] for name, values in state.items() if values[i] is not None}
            if records:  # the graph saves what it is given, so that is not what is written
                states[p] = {name: value.clone() for name, value in states[p].items()}
        if fused:
            self._launch(group, states, grads, scaling if scaled else None)
        else:
            work = Work(self._rule, [group], states, {"differentiable": records}, Memory())
            work.substitutes = dict(zip(own, grads, strict=True))
            lists.prepare(work, [(0, p) for p in own])()
        for name, values in state.items():
            for i, p in enumerate(own):
                new = states[p].get(name)
                if values[i] is None:
                    values[i] = new
                elif new is not None and new is not values[i]:
                    values[i].copy_(new)

    def _group(self, given: dict[str, Any]) -> dict[str, Any]:
        """The param group of the class that has these options."""
        group, declaration = {}, self._rule.declaration
        for option, field in declaration.options.items():
            names = declaration.rule_names(option)
            if option in given:
                group[option] = given[option]
            elif all(name in given for name in names):
                group[option] = tuple(given[name] for name in names)
            else:
                group[option] = field.default
        self._rule.owner.validate(declaration.read(group, keep_tensors=True).hyper)
        return group

    def _checked_state(self, given: dict[str, Any], group: dict[str, Any], params: list[Tensor]) -> dict[str, Any]:
        """The lists of the state that these options keep, by the name of the state.

        Raises:
            ValueError: for a list of another length. TypeError: for parameters and gradients that are no tensors.
            RuntimeError: for such step counts, as in torch.optim.
        """
        declaration = self._rule.declaration
        switches = declaration.read(group, keep_tensors=True).switches
        kinds = {(p.dtype, p.dim()) for p in params if isinstance(p, Tensor)}
        kept = dict.fromkeys([*declaration.counts, *(n for kind in kinds for n in declaration.kept(switches, *kind))])
        state = {name: given[self._state[name]] for name in kept}
        lengths = {self._grads: len(given[self._grads]), **{self._state[name]: len(state[name]) for name in kept}}
        for argument, length in lengths.items():
            if length != len(params):
                raise ValueError(f"{argument} must be as long as params, got {length} beside {len(params)}")
        for argument in (self._params, self._grads):
            for value in given[argument]:
                if not isinstance(value, Tensor):
                    raise TypeError(f"{argument} must be tensors, got {value!r}")
        for count in state.get("step", ()):
            if not isinstance(count, Tensor):
                raise RuntimeError(f"state_steps must be tensors of one element, got {count!r}")
        return state

    def _launch(self, group: dict[str, Any], states: Any, grads: Sequence[Tensor], scaling: Scaling | None) -> None:
        for p, grad in zip(group["params"], grads, strict=True):
            p.grad = grad
        execution = self._steps.sibling()
        work = execution.work_on([group], states, {})
        if execution.surround(work, None, scaling):
            execution.step(work)
