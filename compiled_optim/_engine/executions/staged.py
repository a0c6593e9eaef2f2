"""The steps of a rule that reduces, as native launches: kernels/stages.py cuts it, kernels/staged.py compiles it.

Every step looks at all tensors again, as an eager one does, and fills a table with their addresses. There is one launch
over all tensors of a kernel, and one more after each `batched` function of the rule.
"""

from __future__ import annotations

import ctypes
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from compiled_optim._engine import process
from compiled_optim._engine.declaration import Group
from compiled_optim._engine.executions import gradients, lists
from compiled_optim._engine.executions.launch import Launch, reason_of, references_of
from compiled_optim._engine.executions.state import Journal, withdraw
from compiled_optim._engine.executions.survey import Member, Values, advance, commit, in_order, look
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.kernels import registry, staged
from compiled_optim._engine.kernels.references import Form, refer_to
from compiled_optim._engine.kernels.stages import Batch, Stages
from compiled_optim._engine.kernels.trace import Signature

_RUN = ctypes.CFUNCTYPE(
    None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int
)
# Of the matrices that a `batched` function is given at once: what it is given, and what it makes, has to be held.
_MOST_IN_BATCH = 1 << 23


class _Row(NamedTuple):
    """One tensor of a launch, with the scalars of its step."""

    member: Member
    scalars: Mapping[str, float]


@dataclass
class StagedPlan:
    """What the last step ran, as `launch.Plan` tells it of other rules."""

    frozen: tuple[Callable[..., Any], ...]
    references: Form | None
    launches: list[Launch] = field(default_factory=list)
    elsewhere: list[tuple[int, Tensor, str]] = field(default_factory=list)

    def is_current(self, work: Work) -> bool:
        """Whether the rule is still the one that was compiled."""
        functions = work.rule.frozen(False)
        return functions == self.frozen and (self.references is None or refer_to(functions, self.references))


def prepare(
    work: Work, choices: list[Group], refused: Callable[[list[tuple[Tensor, str]]], None]
) -> tuple[StagedPlan, Callable[[], None]]:
    """One step: its plan, and the function that takes it. What there is to raise is raised here.

    Args:
        refused: told of the parameters that no kernel takes, and why.

    Raises:
        inductor.LoweringError: for a rule that cannot be cut. What `look`, `registry.get` and ``refused`` raise.
    """
    plan = StagedPlan(work.rule.frozen(False), references_of(work, False))
    updates = look(work, choices)

    def scalars(group: int, counts: Sequence[Any]) -> Values:
        return work.evaluate(choices[group].hyper, counts)

    found = in_order(updates, scalars, [False] * len(choices))
    rows: dict[Signature, list[_Row]] = defaultdict(list)
    for members, values, _ in found:
        assert values is not None
        for m in members:
            signature = _signature(work, choices[m.group], m, tuple(values[0]), plan.references)
            m.reason = _reason(work, choices[m.group], m, signature)
            if m.reason:
                plan.elsewhere.append((m.group, m.listed, m.reason))
            else:
                rows[signature].append(_Row(m, {k: float(v) for k, v in values[0].items()}))
    refused([(p, reason) for _, p, reason in plan.elsewhere])
    _, kernels = registry.get(list(rows))
    for signature, its in rows.items():
        launch = Launch(kernels[signature], its[0].member.param.dtype, its[0].member.param.device)
        launch.tensors, launch.elements = len(its), sum(row.member.param.numel() for row in its)
        launch.launches += len(staged.stages_of(signature)[0].batches)
        plan.launches.append(launch)
    eagerly = lists.prepare(work, [(group, p) for group, p, _ in plan.elsewhere]) if plan.elsewhere else None

    @torch.no_grad()
    def take() -> None:
        journal: Journal = []
        taken = [u for u in updates if not u.reason]
        try:
            commit(work, choices, taken, journal)
            for signature, its in rows.items():
                for part in _in_memory(signature, its):
                    _launch(kernels[signature], part)
            for members, values, _ in found:
                if its_members := [m for m in members if not m.reason]:
                    advance(its_members, values[1] if values else None)
        except BaseException:
            withdraw(work, journal)
            raise
        if eagerly is not None:
            eagerly()

    return plan, take


def _signature(work: Work, choice: Group, m: Member, scalars: tuple[str, ...], references: Form | None) -> Signature:
    default = work.rule.declaration.dtype_of
    of_state = [default(n, m.param.dtype) if (t := m.state[n]) is None else t.dtype for n in m.buffers]
    given = gradients.dtype_of(m)
    return Signature(
        *(work.rule, choice.switches, (m.param.dtype, *of_state), m.buffers, scalars, references),
        grad_dtype=None if given == m.param.dtype else given,
    )


def _reason(work: Work, choice: Group, m: Member, signature: Signature) -> str:
    """Why no kernel takes a parameter, or an empty string."""
    p = m.param
    if reason := reason_of(work, choice, m):
        return reason
    if not p.is_cpu:
        return f"it is on {p.device}, where rules that reduce have no kernels"
    if p.is_complex():
        return f"it is {p.dtype}"
    if m.turn or m.listed is not p:
        return "it shares memory with another parameter"
    if work.rule.rounds(p.dtype):
        return "it is rounded at random"
    if not all(t is None or t.is_contiguous() for t in (p, *(m.state[name] for name in m.buffers))):
        return "it is not contiguous"
    if staged.stages_of(signature)[0].of_matrices and p.dim() < 2:
        return f"it has {p.dim()} dimensions"
    return ""


def _in_memory(signature: Signature, rows: list[_Row]) -> Iterator[list[_Row]]:
    """All at once, unless `batched` functions need memory for each: then some of them, those of one shape together."""
    if not staged.stages_of(signature)[0].batches:
        yield rows
        return
    part: list[_Row] = []
    total = 0
    for row in sorted(rows, key=lambda row: (id(row.scalars), row.member.param.shape)):
        size = row.member.param.numel()
        if part and (total + size > _MOST_IN_BATCH or row.scalars != part[0].scalars):
            yield part
            part, total = [], 0
        part.append(row)
        total += size
    yield part


def _launch(kernel: registry.Kernel, rows: list[_Row]) -> None:
    """All stages of these tensors."""
    stages, layout = staged.stages_of(kernel.signature)
    written = [(row.member.param, *(row.member.state[name] for name in row.member.buffers)) for row in rows]
    grads = [_as_read(row.member) for row in rows]
    batches = [(batch, _operands(stages, batch, rows)) for batch in stages.batches]
    results: list[list[Tensor]] = []
    table, slots = array("q"), array("d")
    blank = [0.0] * (len(layout.slots) - len(kernel.signature.scalars) - len(stages.shapes))
    for i, (row, tensors, grad) in enumerate(zip(rows, written, grads, strict=True)):
        p, *buffers = tensors
        table.extend(_shape(stages, p))
        table.extend([p.data_ptr(), grad.data_ptr(), *map(Tensor.data_ptr, buffers)])
        for _, operands in batches:
            table.extend((operands[i].data_ptr(), 0))
        slots.extend([*row.scalars.values(), *(float(of(p.shape)) for of in stages.shapes.values()), *blank])
    run = _RUN(kernel.entry)

    def launch(first: int, last: int) -> None:
        run(len(rows), table.buffer_info()[0], slots.buffer_info()[0], first, last, process.team_size())

    at = 0
    for k, (batch, operands) in enumerate(batches):
        launch(at, (at := stages.stages[batch.node]) - 1)
        numbers = [rows[0].scalars[n] if isinstance(n, str) else n for n in batch.numbers]
        made = [t.to(operands[0].dtype).contiguous() for t in batch.function(operands, *numbers)]
        results.append(made)
        for i, t in enumerate(made):
            table[i * layout.columns + layout.columns - 2 * (len(batches) - k) + 1] = t.data_ptr()
    launch(at, max(part.stage for part in stages.parts))
    increment_version([t for tensors in written for t in tensors])


def _as_read(m: Member) -> Tensor:
    """The gradient, contiguous and in the dtype that the kernel reads."""
    dtype = gradients.read_dtype(m.param, m.grad.dtype)
    return m.grad if m.grad.is_contiguous() and m.grad.dtype == dtype else gradients.like_parameter(m.param, m.grad)


def _shape(stages: Stages, p: Tensor) -> tuple[int, int, int]:
    """How many matrices, and their rows and columns; elements are rows where these are not told apart."""
    if not stages.of_matrices:
        return 1, p.numel(), 1
    rows, columns = p.shape[-2:]
    return p.shape[:-2].numel(), rows, columns


def _operands(stages: Stages, batch: Batch, rows: list[_Row]) -> list[Tensor]:
    """Memory for what a batch is given. Matrices of one shape lie side by side, in the order of the rows."""
    dtype = stages.nodes[batch.operand][1]
    shapes = [row.member.param.shape for row in rows]
    memory = {
        shape: iter(torch.empty(shapes.count(shape), *shape, dtype=dtype).unbind()) for shape in dict.fromkeys(shapes)
    }
    return [next(memory[shape]) for shape in shapes]
