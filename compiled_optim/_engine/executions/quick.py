"""A step in one call of the host module, which is possible while nothing but values changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from compiled_optim._engine import fallback
from compiled_optim._engine.declaration import Group
from compiled_optim._engine.executions.launch import Plan
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.kernels.references import Form, refer_to
from compiled_optim._engine.rule import evaluate
from compiled_optim._engine.torch_private import optim

QuickStep = Callable[[Any], bool]  # takes the step of an optimizer, or returns False if that is left to `Execution`


def never(optimizer: Any) -> bool:
    """Leaves all steps to `Execution`."""
    return False


def offer(
    work: Work, plan: Plan, choices: list[Group], scalar_names: list[tuple[str, ...]]
) -> tuple[QuickStep, QuickStep]:
    """What takes steps that find what the last one found: see `Execution.quick` and `Execution.quick_update`.

    What a step looks at is looked at in each of these too: hooks, profilers, switches of compilation, options, tensors.
    An update comes after hooks and a GradScaler.
    """
    rule, declaration = work.rule, work.rule.declaration
    others = plan.elsewhere or plan.in_graphs or plan.copied or plan.sparse or plan.sharded
    if others or any(launch.kernel.signature.on_device for launch in plan.launches):
        return never, never
    is_update = bool(rule.given) and work.constant is None
    constant = functools.partial(evaluate, rule, given=work.constant or {})
    native: QuickStep = plan.host.quick(
        plan.native,
        () if is_update else ("grad_scale", "found_inf"),
        () if is_update else optim.HOOKS,
        None if is_update else optim.is_profiled,
        fallback.watched(),
        rule.owner,
        *plan.frozen,
        (work.evaluate if is_update else constant) if declaration.carried or rule.given else None,
        declaration.hyper_type,
        declaration.layout,
        tuple([(choice.switches, names) for choice, names in zip(choices, scalar_names, strict=True)]),
        tuple([launch.context for launch in plan.launches]),
    )
    step = native if plan.references is None else _checked(native, plan.frozen, plan.references)
    return (never, step) if is_update else (step, never)


def _checked(native: QuickStep, functions: tuple[Callable[..., Any], ...], known: Form) -> QuickStep:
    """Looks at what the functions refer to, first. Does not hold the plan, which would outlive its optimizer then."""
    return lambda optimizer: refer_to(functions, known) and native(optimizer)
