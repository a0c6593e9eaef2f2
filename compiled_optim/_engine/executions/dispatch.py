"""Runs a step: compiled where it can, otherwise eagerly, and keeps the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compiled_optim._engine import settings
from compiled_optim._engine.cache.compiler import BuildError
from compiled_optim._engine.cache.native import NoCompilerError
from compiled_optim._engine.executions import dtensors, foreach, lists
from compiled_optim._engine.executions.checks import refuse
from compiled_optim._engine.executions.launch import Counts, Plan, Row, expected, make_plan
from compiled_optim._engine.executions.survey import Journal, Values, look, publish_all, withdraw
from compiled_optim._engine.fallback import fall_back, fall_back_for
from compiled_optim._engine.kernels import registry
from compiled_optim._engine.rule import evaluate, first_counts
from compiled_optim._engine.torch_private import dynamo, inductor, version

if TYPE_CHECKING:
    from compiled_optim._engine.kernels.registry import Kernel
    from compiled_optim._engine.kernels.trace import Signature
    from compiled_optim.declare import Choice
    from compiled_optim.optimizer import Optimizer

_KEPT_REASONS = 19  # and the newest
COMPILE_ERRORS = (NoCompilerError, BuildError, inductor.LoweringError, inductor.UntraceableError, OSError, ImportError)


def switched_off() -> str:
    """Why nothing is to be compiled now, or an empty string."""
    return dynamo.compiling_disabled() or ("COMPILED_OPTIM_DISABLE=1" if settings.disabled() else "")


def step(optimizer: Optimizer) -> None:
    """One step of an optimizer, in the execution it was built for."""
    if not optimizer._compiled:
        lists.step(optimizer)
        return
    state = optimizer._execution
    if state is None:
        state = optimizer._execution = Execution()
    state.step(optimizer)


def begin(optimizer: Optimizer) -> None:
    """Starts to compile what the next step needs, if that is known yet. Raises nothing: the step does."""
    state = optimizer._execution = optimizer._execution or Execution()
    state.begin(optimizer)


def _scalar_names(optimizer: Optimizer, choices: list[Choice]) -> list[tuple[str, ...]]:
    """Of each param group; none where they cannot be evaluated, if nothing is to be updated there."""
    algorithm, names = type(optimizer), []
    for group, choice in zip(optimizer.param_groups, choices, strict=True):
        try:
            names.append(tuple(evaluate(algorithm, choice.hyper, first_counts(algorithm, choice.hyper))[0]))
        except Exception:
            if any(p.grad is not None for p in group["params"]):
                raise
            names.append(())
    return names


class Execution:
    """The compiled execution of one optimizer. It holds no reference to it, and is made anew in a copy.

    ``reason``: why the last step ran eagerly, if it did; ``rebuilt``: why the last plans were made.
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.graphs: list[foreach.Graph] = []
        self.reason = ""
        self.rebuilt: list[str] = []
        self._choices: list[Choice] = []
        self._options: list[Any] = []  # as read from the param groups
        self._scalar_names: list[tuple[str, ...]] = []  # of each param group
        self._pairs: list[Counts] = []  # what the next step is expected to ask for
        self._kernels: dict[Signature, Kernel] = {}
        self._warned: set[Any] = set()
        self._given_up = ""
        self._lowering = ""

    def step(self, optimizer: Optimizer) -> None:
        self.reason = switched_off() or self._given_up or self._unavailable(optimizer)
        if self.reason:
            lists.step(optimizer)
            return
        self._lowering = self._lowering or self._choose_lowering(optimizer)
        if self._lowering != "foreach":
            self._step_multi_tensor(optimizer)
        elif any(group.get("capturable") for group in optimizer.param_groups):
            self.reason = "with capturable=True step counts stay on their device, and graphs of lists read them"
            fall_back(self._warned, f"the optimizer steps eagerly: {self.reason}", "leave capturable out")
            lists.step(optimizer)
        else:
            self._step_foreach(optimizer)

    def begin(self, optimizer: Optimizer) -> None:
        off = switched_off() or self._given_up or version.unsupported_version() or not optimizer.elementwise
        if off or self.plan is not None or self._choose_lowering(optimizer) != "multi_tensor":
            return
        with suppress(Exception):  # of an option that is no number, say: the step raises it, and no trace is around it
            choices = optimizer.choices()
            registry.begin(expected(optimizer, choices, _scalar_names(optimizer, choices)))

    def _unavailable(self, optimizer: Optimizer) -> str:
        if self.plan is not None:
            if self.plan.is_current(optimizer):
                return ""
            name = optimizer.declaration.name
            why = f"the update of {name}, or what it refers to, has changed since it was compiled"
            return self._give_up(why, "make such a value a hyperparameter, or build another optimizer after a change")
        unknown = version.unsupported_version()
        return self._give_up(unknown, "install a version that is known to work") if unknown else ""

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
        if self.plan is not None and self.plan.sharded:
            optimizer._gradients = dtensors.redistributed(optimizer)
        try:
            self._launch(optimizer)
        finally:
            if optimizer._gradients is not None:
                optimizer._gradients = None

    def _launch(self, optimizer: Optimizer) -> None:
        changed = self._read_options(optimizer)
        why = "the first step" if self.plan is None else changed
        plan = self._make_plan(optimizer, why) if why else self.plan
        rest: Callable[[], None] | None = None
        foreseen = True
        try:
            for _ in range(3):  # at worst: the plan is stale, the new one needs other scalars, and has them
                if plan is None:
                    return
                rest = None
                if plan.elsewhere:
                    rest = lists.prepare(optimizer, [(group, p) for group, p, _ in plan.elsewhere])
                outcome = plan.run(optimizer, self._rows(optimizer, foreseen))
                if outcome is None:
                    break
                if isinstance(outcome, str):
                    plan = self._make_plan(optimizer, outcome)
                else:
                    self._pairs, foreseen = outcome, False
            else:
                raise RuntimeError(f"a launch plan that was just made does not fit: {outcome}")
        except BaseException:
            self._drop_plan(optimizer)
            raise
        declaration = optimizer.declaration
        if declaration.carried:  # rounded by the tensors that carry it: what the next step needs, it will say
            self._pairs = []
        else:
            counted = bool(declaration.counts)
            self._pairs = [(group, (step + 1.0 if counted else 2.0,)) for group, (step,) in self._pairs]
        if rest is not None:
            rest()

    def _drop_plan(self, optimizer: Optimizer) -> None:
        """With the state that was made for it, if no step was taken since: its first step is still to come."""
        if self.plan is not None and self.plan.journal:
            withdraw(optimizer, self.plan.journal)
            self.plan = None
        self._pairs = []

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
            try:
                equal = options == self._options[i]
            except (RuntimeError, ValueError):  # of arrays, which answer for each element
                equal = False
            if old.has_tensors or not equal:
                self._options[i], self._choices[i] = options, optimizer.declaration.choose(group)
                if self._choices[i].switches != old.switches:
                    why = "a switch changed"
        return why

    def _rows(self, optimizer: Optimizer, foreseen: bool) -> list[Row]:
        """The scalars that are asked for; none if they were only ``foreseen`` and not all can be evaluated."""
        rows = []
        for group, counts in self._pairs:
            try:
                values, after = evaluate(type(optimizer), self._choices[group].hyper, counts)
            except Exception:
                if foreseen:  # perhaps nothing is updated in this group
                    return []
                raise
            if tuple(values) != self._scalar_names[group]:
                expected, got = list(self._scalar_names[group]), list(values)
                raise ValueError(f"scalars must return the same scalars in every step, {expected}, got {got}")
            rows.append((group, counts, (*values.values(), *after)))
        return rows

    def _make_plan(self, optimizer: Optimizer, why: str) -> Plan | None:
        """None if the step was done otherwise."""
        self._drop_plan(optimizer)
        self.plan = None
        refuse(optimizer, self._choices)
        if optimizer._gradients is None:
            optimizer._gradients = dtensors.redistributed(optimizer)
        look(optimizer, self._choices, allocate=False)
        self._scalar_names = _scalar_names(optimizer, self._choices)

        def refused(elsewhere: list[tuple[Tensor, str]]) -> None:
            fall_back_for(self._warned, elsewhere, "parameter", "updated eagerly")

        try:
            if not optimizer.elementwise:
                raise inductor.LoweringError(
                    f"{optimizer.declaration.name} is not elementwise, so not one fusible loop"
                )
            self.plan = plan = make_plan(optimizer, self._choices, self._scalar_names, refused)
        except inductor.LoweringError as error:
            fall_back(self._warned, str(error), 'it is compiled as with compiled="foreach"')
            self._lowering = "foreach"
            self._step_foreach(optimizer)
            return None
        except COMPILE_ERRORS as error:
            self.reason = self._give_up(str(error), "repair that, or build the optimizer with compiled=False")
            lists.step(optimizer)
            return None
        self.rebuilt = [*self.rebuilt[-_KEPT_REASONS:], why]
        for launch in plan.launches:  # where a kernel came from is told of the first plan that used it
            launch.kernel = self._kernels.setdefault(launch.kernel.signature, launch.kernel)
        return plan

    def _step_foreach(self, optimizer: Optimizer) -> None:
        choices = optimizer.choices()
        updates = look(optimizer, choices)
        sparse = [u for u in updates if u.grad.is_sparse]
        if sparse:
            fall_back(self._warned, "sparse gradients are applied eagerly", "the other parameters are compiled")
            updates = [u for u in updates if not u.grad.is_sparse]
        algorithm, switches = type(optimizer), [choice.switches for choice in choices]
        off = [False] * len(choices)

        def scalars(group: int, counts: Sequence[Any]) -> Values:
            return evaluate(algorithm, choices[group].hyper, counts)

        journal: Journal = []
        with torch.no_grad():
            rest = lists.batches(sparse, scalars, off, off)
            try:
                publish_all(optimizer, [*updates, *sparse], journal)
                try:
                    self.graphs = foreach.run(algorithm, updates, switches, scalars)
                except foreach.Unfinished as left:
                    reason = f"torch.compile failed: {left.__cause__}"
                    self.reason = self._give_up(reason, "build it with compiled=False")
                    rest = lists.batches(left.updates, scalars, off, off) + rest
                lists.run(algorithm, rest, switches, scalars)
            except BaseException:
                withdraw(optimizer, journal)
                raise
