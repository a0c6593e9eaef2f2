"""A step in one call of the host module, which is possible while nothing but values changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from compiled_optim._engine import fallback
from compiled_optim._engine.declaration import Group
from compiled_optim._engine.executions.launch import Plan
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.kernels.references import refer_to
from compiled_optim._engine.rule import evaluate
from compiled_optim._engine.torch_private import optim

QuickStep = Callable[[Any], bool]  # takes the step of an optimizer, or returns False if that is left to `Execution`


def never(optimizer: Any) -> bool:
    """Leaves all steps to `Execution`."""
    return False


def _evaluation(work: Work) -> Callable[..., Any]:
    """Evaluates the scalars of a row, and the recurrent ones if the rule has some."""
    whole = functools.partial(evaluate, work.rule, given=work.constant or {})
    return whole if work.rule.declaration.carried else lambda h, counts: whole(h, counts)[0]


def offer(work: Work, plan: Plan, choices: list[Group], scalar_names: list[tuple[str, ...]]) -> QuickStep:
    """Takes the steps that find what the last one found: the same plan, and nobody who watches.

    Hooks, profilers, switches of compilation, options and tensors are looked at in each step, as `Execution.step` does.
    """
    rule, declaration = work.rule, work.rule.declaration
    others = plan.elsewhere or plan.in_graphs or plan.copied or plan.sparse or plan.sharded
    if (
        others
        or (rule.extras.numbers and work.constant is None)
        or any(launch.kernel.signature.on_device for launch in plan.launches)
    ):
        return never
    native: QuickStep = plan.host.quick(
        plan.native,
        ("grad_scale", "found_inf"),
        optim.HOOKS,
        optim.is_profiled,
        fallback.watched(),
        rule.owner,
        *plan.frozen,
        _evaluation(work) if declaration.carried or rule.extras.numbers else None,
        declaration.hyper_type,
        declaration.layout,
        tuple([(choice.switches, names) for choice, names in zip(choices, scalar_names, strict=True)]),
        tuple([launch.context for launch in plan.launches]),
    )
    if plan.references is None:
        return native
    functions, known = plan.frozen, plan.references
    return lambda optimizer: refer_to(functions, known) and native(optimizer)
