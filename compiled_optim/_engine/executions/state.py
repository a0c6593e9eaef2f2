"""State: made when a first gradient arrives, given to the optimizer, and taken back if the step raises."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.executions import dtensors
from compiled_optim._engine.executions.checks import is_count, number_of
from compiled_optim._engine.executions.work import Work
from compiled_optim.declare import Copy

# A parameter, what it had of the state that was made (None: it had no state at all), and what was made, with the
# version of each tensor then.
Journal = list[tuple[Tensor, dict[str, Any] | None, dict[str, tuple[Tensor, int]]]]


def make_state(work: Work, p: Tensor, group: dict[str, Any], on: Any, *, allocate: bool = True) -> dict[str, Any]:
    """The state that ``p`` still lacks under these switches; None for buffers if not to be allocated.

    A count that is a number, or in a dtype that does not count well, is made anew. ``work.state`` is not changed.
    """
    declaration, present = work.rule.declaration, work.state.get(p, {})
    made: dict[str, Any] = {}
    for name in declaration.counts:
        count = present.get(name)
        if count is None:
            # an algorithm that counts only for its extras may have stepped before it had them
            begun = float(work.rule.extras.counts and bool(present))
            value = begun if name == "step" else declaration.carried[name].first(group)
            made[name] = count_tensor(p, group, value)
        elif not is_count(count):
            made[name] = count_tensor(p, group, number_of(work, p, name, count))
    for name in declaration.kept(on, p.dtype, p.dim()):
        if present.get(name) is None:
            made[name] = None
            if allocate:
                # torch.optim takes the constructor's value where state is made there, whatever a group says
                values = work.defaults if work.rule.state_at_construction else group
                dtype, its = declaration.dtype_of(name, p.dtype), declaration.buffers[name]
                if name in declaration.means:
                    made[name] = p.new_empty(declaration.shape_of(name, p.shape), dtype=dtype, requires_grad=False)
                else:
                    made[name] = torch.empty_like(
                        p, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format
                    )
                if isinstance(its, Copy):
                    made[name].copy_(p.detach())
                else:
                    _fill(made[name], its.first(values))
    return made


def _fill(buffer: Tensor, value: float | Tensor) -> None:
    buffer = dtensors.local(buffer)
    # the real and the imaginary part are two numbers
    (torch.view_as_real(buffer) if buffer.is_complex() else buffer).fill_(value)


def count_tensor(p: Tensor, group: dict[str, Any], value: float | Tensor) -> Tensor:
    """A 0-d state tensor with torch.optim's dtype and device."""
    fused = group.get("fused")
    double = torch.get_default_dtype() == torch.float64 and not fused
    device = p.device if group.get("capturable") or fused else "cpu"
    # filled on its device: a copy from the host would make that wait, and a CUDA graph cannot capture one
    return torch.empty((), dtype=torch.float64 if double else torch.float32, device=device).fill_(value)


def counted_on_device(group: dict[str, Any]) -> bool:
    """Whether the step counts of a param group must not be read by the host, which would wait for their device."""
    on_device = group.get("fused") and any(p.device.type != "cpu" for p in group["params"])
    return bool(group.get("capturable") or on_device)


def publish(work: Work, made: Iterable[tuple[Tensor, dict[str, Any]]], journal: Journal) -> None:
    """Gives the optimizer the state that was made, and notes in ``journal`` what `withdraw` needs to take it back."""
    for p, values in made:
        had = work.state.get(p)
        kept = None if had is None else {name: had[name] for name in values if name in had}
        journal.append((p, kept, {name: (value, _version_of(value)) for name, value in values.items()}))
        work.state[p].update(values)


def withdraw(work: Work, journal: Journal) -> None:
    """Takes back the state of a step that raised, where it was not written yet: the next step makes it anew.

    That is a first step then, as this one was to be.
    """
    for p, had, made in journal:
        state = work.state.get(p)
        if state is None:
            continue
        for name, (value, version) in made.items():
            if state.get(name) is value and _version_of(value) == version:
                del state[name]
                state.update({name: had[name]} if had and name in had else {})
        if had is None and not state:
            del work.state[p]
    journal.clear()


def _version_of(value: Tensor) -> int:
    """Counts what was written to a tensor; 0 for one in inference mode, which does not count."""
    value = dtensors.local(value)
    return 0 if value.is_inference() else value._version
