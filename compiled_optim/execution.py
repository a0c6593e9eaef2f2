"""Runs a step: compiled where it can, otherwise eagerly, and keeps the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from compiled_optim import eager, foreach, lower, settings
from compiled_optim.cache.build import BuildError
from compiled_optim.cache.libraries import NoCompilerError
from compiled_optim.fallback import fall_back
from compiled_optim.launch.plan import Plan, make_plan
from compiled_optim.updates import collect

if TYPE_CHECKING:
    from compiled_optim.declare import Choice
    from compiled_optim.kernels import Kernel
    from compiled_optim.optimizer import Optimizer
    from compiled_optim.trace import Signature

_FAILURES = (NoCompilerError, BuildError, lower.LoweringError, OSError, ImportError)


def step(optimizer: Optimizer) -> None:
    """One step of an optimizer, in the execution it was built for."""
    lower.without_dynamo(_compiled if optimizer._compiled else eager.step)(optimizer)


def _compiled(optimizer: Optimizer) -> None:
    state = optimizer._execution
    if state is None:
        state = optimizer._execution = Execution()
    state.step(optimizer)


class Execution:
    """The compiled execution of one optimizer. It holds no reference to it, and is made anew in a copy.

    ``reason``: why the last step ran eagerly, if it did; ``rebuilt``: why each plan was made.
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.graphs: list[foreach.Graph] = []
        self.reason = ""
        self.rebuilt: list[str] = []
        self._choices: list[Choice] = []
        self._options: list[Any] = []  # as read from the param groups
        self._kernels: dict[Signature, Kernel] = {}
        self._warned: set[str] = set()
        self._given_up = ""
        self._lowering = ""

    def step(self, optimizer: Optimizer) -> None:
        self.reason = lower.compiling_disabled() or self._given_up or self._unavailable()
        if self.reason:
            eager.step(optimizer)
            return
        self._lowering = self._lowering or self._choose_lowering(optimizer)
        if self._lowering == "foreach":
            self._step_foreach(optimizer)
        else:
            self._step_multi_tensor(optimizer)

    def _unavailable(self) -> str:
        if self.plan is not None:  # the environment is read when a plan is made
            return ""
        if settings.disabled():
            return "COMPILED_OPTIM_DISABLE=1"
        unknown = lower.unsupported_version()
        return self._give_up(unknown, "install a version that is") if unknown else ""

    def _give_up(self, reason: str, remedy: str) -> str:
        fall_back(self._warned, f"the optimizer steps eagerly: {reason}", remedy)
        self._given_up = reason
        return reason

    def _choose_lowering(self, optimizer: Optimizer) -> str:
        devices = {p.device.type for group in optimizer.param_groups for p in group["params"]}
        if optimizer._compiled == "multi_tensor" or not devices & {"cuda", "xpu"}:
            return str(optimizer._compiled) if optimizer._compiled == "foreach" else "multi_tensor"
        return "foreach"

    def _step_multi_tensor(self, optimizer: Optimizer) -> None:
        changed = self._read_options(optimizer)
        why = "the first step" if self.plan is None else changed
        plan = self._make_plan(optimizer, why) if why else self.plan
        for _ in range(2):
            if plan is None:
                return
            why = plan.run(optimizer, self._scalars(optimizer))
            if why is None:
                break
            plan = self._make_plan(optimizer, why)
        else:
            raise RuntimeError(f"a launch plan that was just made does not fit: {why}")
        if plan.elsewhere:
            eager.step(optimizer, [(group, p) for group, p, _ in plan.elsewhere])

    def _read_options(self, optimizer: Optimizer) -> str | None:
        """Reads the param groups again; why the plan no longer fits, or None."""
        read = optimizer.declaration.read
        groups = optimizer.param_groups
        if len(groups) != len(self._options):
            self._options, self._choices = [read(group) for group in groups], optimizer.choices()
            return "the param groups changed"
        why = None
        for i, group in enumerate(groups):
            options, old = read(group), self._choices[i]
            if old.has_tensors or options != self._options[i]:
                self._options[i], self._choices[i] = options, optimizer.declaration.choose(group)
                if self._choices[i].switches != old.switches:
                    why = "a switch changed"
        return why

    def _scalars(self, optimizer: Optimizer) -> Any:
        scalars, choices = type(optimizer).scalars, self._choices
        return lambda group, step: tuple(scalars(choices[group].hyper, step).values())

    def _make_plan(self, optimizer: Optimizer, why: str) -> Plan | None:
        """None if the step was done otherwise."""
        self.plan = None
        names = [tuple(type(optimizer).scalars(choice.hyper, 1)) for choice in self._choices]
        try:
            self.plan = plan = make_plan(optimizer, self._choices, names)
        except lower.LoweringError as error:
            fall_back(self._warned, str(error), 'it is compiled as with compiled="foreach"')
            self._lowering = "foreach"
            self._step_foreach(optimizer)
            return None
        except _FAILURES as error:
            self.reason = self._give_up(str(error), "repair that, or build the optimizer with compiled=False")
            eager.step(optimizer)
            return None
        self.rebuilt.append(why)
        for launch in plan.launches:  # where a kernel came from is told of the first plan that used it
            launch.kernel = self._kernels.setdefault(launch.kernel.signature, launch.kernel)
        for _, p, refusal in plan.elsewhere:
            reason = f"a parameter of shape {tuple(p.shape)} is updated eagerly, because {refusal}"
            fall_back(self._warned, reason, "the others are compiled; a plain dense tensor would be too")
        return plan

    def _step_foreach(self, optimizer: Optimizer) -> None:
        choices = optimizer.choices()
        updates = collect(optimizer, choices)
        sparse = [(u.group, u.param) for u in updates if u.grad.is_sparse]
        if sparse:
            fall_back(self._warned, "sparse gradients are applied eagerly", "the other parameters are compiled")
        try:
            with torch.no_grad():
                self.graphs = foreach.run(
                    type(optimizer),
                    [u for u in updates if not u.grad.is_sparse],
                    [choice.switches for choice in choices],
                    lambda group, step: type(optimizer).scalars(choices[group].hyper, step),
                )
        except Exception as error:
            self.reason = self._give_up(f"torch.compile failed: {error}", "build it with compiled=False")
            eager.step(optimizer)
            return
        if sparse:
            eager.step(optimizer, sparse)
