"""Runs a step: compiled where it can, otherwise eagerly, and keeps the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compiled_optim._engine.declaration import Group
from compiled_optim._engine.executions import dtensors, gradients, lists, quick
from compiled_optim._engine.executions.checks import are_fake, refuse
from compiled_optim._engine.executions.launch import Counts, Plan, Row, expected, make_plan
from compiled_optim._engine.executions.memory import Memory
from compiled_optim._engine.executions.scaling import Scaling, unscale
from compiled_optim._engine.executions.state import counted_on_device, withdraw
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.fallback import COMPILE_ERRORS, Fallback
from compiled_optim._engine.kernels import registry
from compiled_optim._engine.kernels.backends import backend_of
from compiled_optim._engine.kernels.registry import Kernel
from compiled_optim._engine.kernels.trace import Signature
from compiled_optim._engine.one_pass import OnePass
from compiled_optim._engine.rule import Rule
from compiled_optim._engine.torch_private import inductor, optim, version

if TYPE_CHECKING:
    from compiled_optim._engine.executions.staged import StagedPlan
    from compiled_optim._engine.executions.traced_lists import ListGraph

# The types of devices that torch.compile makes good kernels for. Parameters on others are updated eagerly.
GRAPH_DEVICES = ("cuda", "xpu")
_KEPT_REASONS = 19  # besides the newest
_REMEDY = "repair that, or build the optimizer with compiled=False"


def _prepare_graphs(
    work: Work, fallback: Fallback, only: list[tuple[int, Tensor]] | None = None
) -> Callable[[], tuple[list[ListGraph], str]]:
    # imported here, because most processes have no use for it and would pay for it in their first step
    from compiled_optim._engine.executions import traced_lists

    return traced_lists.prepare(work, fallback, only)


class Execution:
    """How one optimizer steps. It holds no reference to the optimizer, and a copy of that makes its own.

    ``quick``: takes the next step if nothing but values changed since the last; ``quick_update``: the same of a step
    that has its `Work.given`, after `surround`. ``reason``: why the last step ran eagerly, if it did; ``rebuilt``: why
    the last plans were made.
    ``in_backward``: whether parameters are updated during the backward pass.
    """

    in_backward = False

    def __init__(self, rule: Rule, compiled: bool | str) -> None:
        self._work = Work(rule, [], {}, {}, Memory())
        self._compiled = compiled
        self.plan: Plan | None = None
        self.quick: quick.QuickStep = quick.never
        self.quick_update: quick.QuickStep = quick.never
        self._offered: tuple[quick.QuickStep, quick.QuickStep] = self.quick, self.quick_update
        self.staged: StagedPlan | None = None
        self.graphs: list[ListGraph] = []
        self.reason = ""
        self.rebuilt: list[str] = []
        self._choices: list[Group] = []
        self._options: list[Any] = []  # as read from the param groups
        self._scalar_names: list[tuple[str, ...]] = []  # of each param group
        self._kernels: dict[Signature, Kernel] = {}
        self._fallback = Fallback()
        self._lowering = ""

    @property
    def parts(self) -> list[Execution]:
        """What takes the steps: this, or an execution for each block of parameters."""
        return [self]

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self._work.groups for p in group["params"]]

    def sibling(self) -> Execution:
        """Another for the same optimizer, which has the same kernels, and of which nothing is told twice."""
        other = Execution(self._work.rule, self._compiled)
        other._fallback, other._kernels = self._fallback, self._kernels
        return other

    def restart(self) -> None:
        """Called when gradients are reset."""

    def work_on(self, groups: list[dict[str, Any]], state: Any, defaults: dict[str, Any]) -> Work:
        """What a step is taken on, for an optimizer that has these now."""
        work = self._work
        work.groups, work.state, work.defaults = groups, state, defaults
        return work

    def step(self, work: Work) -> None:
        """One step, compiled where it can be."""
        if not self._compiled:
            lists.step(work)
            return
        self.reason = self._fallback.reason() or self._unavailable(work)
        if self.reason:
            self.quick = self.quick_update = quick.never
            self._step_otherwise(work, lambda: lists.step(work))
            return
        self._lowering = self._lowering or self._choose_lowering(work)
        if self._lowering == "staged":
            self._step_staged(work)
        elif self._lowering != "foreach":
            self._step_multi_tensor(work)
        else:
            self._step_in_graphs(work)

    def _step_staged(self, work: Work) -> None:
        """A step of a rule that reduces."""
        from compiled_optim._engine.executions import staged  # few optimizers need it

        if self._step_fakes(work):
            return
        try:
            plan, take = staged.prepare(work, work.read(), self._refused)
        except inductor.LoweringError as error:
            self._step_in_graphs_after(work, error)
        except COMPILE_ERRORS as error:
            self.reason = self._fallback.give_up(str(error), _REMEDY)
            lists.step(work)
        else:
            for launch in plan.launches:  # explain tells where a kernel came from when it was first used
                launch.kernel = self._kernels.setdefault(launch.kernel.signature, launch.kernel)
            self.staged = plan
            take()

    def _refused(self, elsewhere: list[tuple[Tensor, str]]) -> None:
        self._fallback.tell_of(elsewhere, "parameter", "updated eagerly")

    def _step_in_graphs_after(self, work: Work, error: inductor.LoweringError) -> None:
        self._fallback.tell(str(error), 'it is compiled as with compiled="foreach"')
        self._lowering = "foreach"
        self._step_otherwise(work, lambda: self._step_in_graphs(work))

    def _step_in_graphs(self, work: Work) -> None:
        if not self._step_fakes(work):
            self.graphs, self.reason = _prepare_graphs(work, self._fallback)()

    def _step_fakes(self, work: Work) -> bool:
        """Steps eagerly if parameters are fake, without a word: whoever swapped them in wants operations to trace."""
        fake = are_fake([p for group in work.groups for p in group["params"]])
        if fake:
            self.reason = "its parameters are fake tensors"
            self._step_otherwise(work, lambda: lists.step(work))
        return fake

    def _step_otherwise(self, work: Work, step: Callable[[], None]) -> None:
        """A step without launches, which were to divide the gradients by their scale."""
        scaling, work.scaling = work.scaling, None
        if scaling is None or unscale(work.groups, scaling):
            step()

    def surround(self, work: Work, one_pass: OnePass | None, scaling: Scaling | None) -> bool:
        """Does what comes before the update, and says what goes into its launch; False if the step must be skipped."""
        if one_pass is not None:
            work.given = one_pass.given(1.0)
            work.constant = work.given if one_pass.is_constant else None
        if one_pass is None or not work.rule.extras.factor:
            return scaling is None or self._unscale(work, scaling)
        # imported here, as all that few scripts ask for: to import the package would take longer
        from compiled_optim._engine.executions import clipping

        skips = self._may_scale(work) if self.plan is None else self.plan.skips
        compiled = bool(self._compiled) and not self._fallback.reason()
        if compiled and (self.plan is not None or not self._unavailable(work)):
            self.begin(work)  # beside what takes the norm
            try:
                return clipping.begin(work, one_pass, scaling, skips=skips, compiled=True)
            except COMPILE_ERRORS as error:
                self._fallback.give_up(str(error), _REMEDY)
        return clipping.begin(work, one_pass, scaling, skips=skips, compiled=False)

    def zero_gradients(self, groups: list[dict[str, Any]]) -> bool:
        """Sets gradients to zero, those in host memory in one pass; False if nothing was done, as none was launched."""
        plan = self.plan or self.staged
        launched = plan is not None and any(launch.device.type == "cpu" for launch in plan.launches)
        if not launched or self._fallback.reason() or optim.is_profiled():
            return False
        try:
            gradients.zero([p for group in groups for p in group["params"]])
        except COMPILE_ERRORS as error:
            self._fallback.give_up(str(error), _REMEDY)
            return False
        return True

    def _unscale(self, work: Work, scaling: Scaling) -> bool:
        """Divides the gradients by their scale, or leaves that to the launches; False if the step must be skipped."""
        if self._may_scale(work) if self.plan is None else self.plan.scales:
            work.scaling = scaling
            return True
        return unscale(work.groups, scaling)

    def _may_scale(self, work: Work) -> bool:
        """Whether the step is likely to be nothing but launches that can divide gradients."""
        if (
            not self._compiled
            or (self._lowering or self._choose_lowering(work)) == "foreach"
            or self._fallback.reason()
        ):
            return False
        backends = [backend_of(p) for group in work.groups for p in group["params"]]
        return all(b is not None and b.asynchronous for b in backends) and all(map(counted_on_device, work.groups))

    @property
    def has_stepped(self) -> bool:
        return bool(self.plan or self.staged or self.graphs or self.reason)

    def begin(self, work: Work) -> None:
        """Starts to compile what the next step needs, if that is known yet. Raises nothing: the step does."""
        off = self._fallback.reason() or version.unsupported_version() or not work.rule.elementwise
        if off or self.plan is not None or self._choose_lowering(work) != "multi_tensor":
            return
        with suppress(Exception):  # the step will raise it, where no graph is traced around it
            choices = work.read()
            registry.prefetch(expected(work, choices, work.scalar_names(choices)))

    def _unavailable(self, work: Work) -> str:
        plan = self.plan or self.staged
        if plan is not None:
            if plan.is_current(work):
                return ""
            name = work.rule.name
            why = f"the update of {name}, or what it refers to, has changed since it was compiled"
            return self._fallback.give_up(
                why, "make such a value a hyperparameter, or build another optimizer after a change"
            )
        unknown = version.unsupported_version()
        return self._fallback.give_up(unknown, "install a version that is known to work") if unknown else ""

    def _choose_lowering(self, work: Work) -> str:
        params = [p for group in work.groups for p in group["params"]]
        in_graphs = self._compiled == "foreach" or (params and all(map(self._goes_into_graph, params)))
        if not in_graphs and not work.rule.elementwise and all(p.device.type == "cpu" for p in params):
            return "staged"
        return "foreach" if in_graphs else "multi_tensor"

    def _goes_into_graph(self, p: Tensor) -> bool:
        """Whether a parameter that no kernel takes is updated as with ``compiled="foreach"``."""
        return self._compiled is True and p.device.type in GRAPH_DEVICES and backend_of(p) is None

    def _step_multi_tensor(self, work: Work) -> None:
        if self.plan is not None and self.plan.sharded:
            work.substitutes = dtensors.redistributed(work)
        try:
            self._launch(work)
        finally:
            work.substitutes = work.scaling = None

    def _launch(self, work: Work) -> None:
        changed = self._read_options(work)
        scaled = work.scaling is not None and work.scaling.grad_scale is not None
        why = "the first step" if self.plan is None else changed
        if not why and self.plan is not None and self.plan.scaled != scaled:
            why = "a GradScaler came or went"
        plan = self._make_plan(work, why) if why else self.plan
        rest: list[Callable[[], Any]] = []
        needed: list[Counts] | None = None
        try:
            for _ in range(3):  # at worst the plan is stale, the new one needs other scalars, and then runs
                if plan is None:
                    return
                rest = self._prepare_rest(work, plan) if plan.elsewhere or plan.in_graphs else []
                outcome = plan.run(work, self._rows(work, plan, needed))
                if outcome is None:
                    break
                if isinstance(outcome, str):
                    plan = self._make_plan(work, outcome)
                else:
                    needed = outcome
            else:
                raise RuntimeError(f"a launch plan that was just made does not fit: {outcome}")
        except BaseException:
            self._drop_plan(work)
            raise
        self.quick, self.quick_update = self._offered
        for take in rest:
            take()

    def _prepare_rest(self, work: Work, plan: Plan) -> list[Callable[[], Any]]:
        """The updates that are no part of the launches."""
        rest: list[Callable[[], Any]] = []
        if plan.elsewhere:
            rest.append(lists.prepare(work, [(group, p) for group, p, _ in plan.elsewhere]))
        if plan.in_graphs:
            take = _prepare_graphs(work, self._fallback, plan.in_graphs)

            def take_graphs() -> None:
                self.graphs, self.reason = take()

            rest.append(take_graphs)
        return rest

    def _drop_plan(self, work: Work) -> None:
        """With the state that was made for it, if no step was taken since: its first step is still to come."""
        if self.plan is not None and self.plan.journal:
            withdraw(work, self.plan.journal)
            self.plan = None

    def _read_options(self, work: Work) -> str | None:
        """Reads the param groups again; why the plan no longer fits, or None."""
        values = work.rule.declaration.values
        groups = work.groups
        if len(groups) != len(self._options):
            self._options, self._choices = [values(group) for group in groups], [*map(self._read, groups)]
            return "the param groups changed"
        why = None
        for i, group in enumerate(groups):
            options, old = values(group), self._choices[i]
            try:
                equal = options == self._options[i]
            except (RuntimeError, ValueError):  # arrays compare element by element
                equal = False
            if old.has_tensors or not equal:
                self._options[i], self._choices[i] = options, self._read(group)
                if self._choices[i].switches != old.switches:
                    why = "a switch changed"
        return why

    def _read(self, group: dict[str, Any]) -> Group:
        """The values of a param group; tensors stay what they are where to read them would make the host wait."""
        return self._work.rule.declaration.read(group, keep_tensors=counted_on_device(group))

    def _rows(self, work: Work, plan: Plan, needed: list[Counts] | None) -> list[Row]:
        """The scalars that are ``needed``; or else the expected ones, and none unless all can be evaluated."""
        rows: list[Row] = []
        # a placeholder: the kernels find the factor on their device
        there = {"grad_factor": math.nan} if work.given and work.factor is not None else None
        for group, counts in plan.host.expected(plan.native) if needed is None else needed:
            if group < 0:
                rows.append(plan.device_row(work, group, counts, self._choices))
                continue
            try:
                h = self._choices[group].hyper
                if self._choices[group].has_tensors:
                    h = h._make([v.item() if isinstance(v, Tensor) else v for v in h])
                values, after = work.evaluate(h, counts)
            except Exception:
                if needed is None:  # perhaps nothing is updated in this group
                    return []
                raise
            if there:
                values |= there
            if tuple(values) != self._scalar_names[group]:
                expected, got = list(self._scalar_names[group]), list(values)
                raise ValueError(f"scalars must return the same scalars in every step, {expected}, got {got}")
            rows.append((group, counts, (*values.values(), *after)))
        return rows

    def _make_plan(self, work: Work, why: str) -> Plan | None:
        """None if the step was done otherwise, or is skipped."""
        self._drop_plan(work)
        self.plan, self.graphs = None, []
        self.quick = self.quick_update = quick.never
        if self._step_fakes(work):
            return None
        refuse(work, self._choices)
        if work.substitutes is None:
            work.substitutes = dtensors.redistributed(work)
        self._scalar_names = work.scalar_names(self._choices)

        try:
            if not work.rule.elementwise:
                raise inductor.LoweringError(f"{work.rule.name} is not elementwise, so not one fusible loop")
            self.plan = plan = make_plan(work, self._choices, self._scalar_names, self._refused, self._goes_into_graph)
        except inductor.LoweringError as error:
            self._step_in_graphs_after(work, error)
            return None
        except COMPILE_ERRORS as error:
            self.reason = self._fallback.give_up(str(error), _REMEDY)
            self._step_otherwise(work, lambda: lists.step(work))
            return None
        if work.scaling is not None and not (plan.skips if work.scaling.grad_scale is None else plan.scales):
            scaling, work.scaling = work.scaling, None
            self._drop_plan(work)
            taken = unscale(work.groups, scaling)
            return self._make_plan(work, "gradients are divided by their scale before a launch") if taken else None
        self._offered = quick.offer(work, plan, self._choices, self._scalar_names)
        self.rebuilt = [*self.rebuilt[-_KEPT_REASONS:], why]
        for launch in plan.launches:  # explain tells where a kernel came from when it was first used
            launch.kernel = self._kernels.setdefault(launch.kernel.signature, launch.kernel)
        return plan
