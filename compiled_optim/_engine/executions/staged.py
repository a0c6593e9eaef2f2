"""The steps of a rule that reduces, as native launches: kernels/stages.py cuts it, kernels/staged.py compiles it.

Every step looks at all tensors again, as an eager one does, and fills a table with their addresses. There is one launch
over all tensors of a kernel, and one more after each `batched` function of the rule. What such a function is given has
to be held in memory, so large models are taken in portions, each with launches of its own.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from compiled_optim._engine import process
from compiled_optim._engine.declaration import Group
from compiled_optim._engine.executions import gradients, lists
from compiled_optim._engine.executions.checks import PLAIN
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


class _Rows(NamedTuple):
    """Tensors of one kind in a launch, with the scalars of their step."""

    members: list[Member]
    scalars: dict[str, float]


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
    in_turns = any([m.turn for m in updates])  # noqa: C419  # what one of them writes another reads: all are eager
    rows: dict[Signature, list[_Rows]] = defaultdict(list)
    for members, values, _ in found:
        assert values is not None
        choice = choices[members[0].group]
        signature = _signature(work, choice, members[0], tuple(values[0]), plan.references)
        of_all = reason_of(work, choice, members[0]) or _reason_of_kind(work, members[0])
        for m in members:
            m.reason = "it shares memory with another parameter" if in_turns else of_all or _reason(m, signature)
        plan.elsewhere += [(m.group, m.listed, m.reason) for m in members if m.reason]
        if taken := [m for m in members if not m.reason]:
            rows[signature].append(_Rows(taken, {k: float(v) for k, v in values[0].items()}))
    refused([(p, reason) for _, p, reason in plan.elsewhere])
    _, kernels = registry.get(list(rows))
    portions: dict[Signature, list[list[_Rows]]] = {}
    for signature, its in rows.items():
        params = [m.param for kind in its for m in kind.members]
        launch = Launch(kernels[signature], params[0].dtype, params[0].device)
        launch.tensors, launch.elements = len(params), sum(map(Tensor.numel, params))
        portions[signature] = [*_in_memory(signature, its)]
        launch.launches = len(portions[signature]) * (1 + len(staged.stages_of(signature)[0].batches))
        plan.launches.append(launch)
    eagerly = lists.prepare(work, [(group, p) for group, p, _ in plan.elsewhere]) if plan.elsewhere else None

    @torch.no_grad()
    def take() -> None:
        journal: Journal = []
        taken = [u for u in updates if not u.reason]
        try:
            commit(work, choices, taken, journal)
            for signature, its in portions.items():
                for portion in its:
                    _launch(kernels[signature], portion)
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


def _reason_of_kind(work: Work, m: Member) -> str:
    """Why no kernel takes parameters of a kind, or an empty string."""
    if not m.param.is_cpu:
        return f"it is on {m.param.device}, where rules that reduce have no kernels"
    if m.param.is_complex():
        return f"it is {m.param.dtype}"
    return "it is rounded at random" if work.rule.rounds(m.param.dtype) else ""


def _reason(m: Member, signature: Signature) -> str:
    """Why no kernel takes a parameter, or an empty string."""
    p = m.param
    if type(p) not in PLAIN:
        return f"its type is {type(p).__name__}"
    if type(m.grad) not in PLAIN:
        return f"its gradient is a {type(m.grad).__name__}"
    if m.listed is not p:
        return "it is a shard"
    if not all([type(t) in PLAIN for t in map(m.state.get, m.buffers) if t is not None]):  # noqa: C419
        return "its state is of another type"
    if not all([t is None or t.is_contiguous() for t in (p, *map(m.state.get, m.buffers))]):  # noqa: C419
        return "it is not contiguous"
    if p.dim() < 2 and staged.stages_of(signature)[0].of_matrices:
        return f"it has {p.dim()} dimensions"
    return ""


def _in_memory(signature: Signature, rows: list[_Rows]) -> Iterator[list[_Rows]]:
    """All at once, unless `batched` functions need memory for each: then some of them, those of one shape together."""
    if not staged.stages_of(signature)[0].batches:
        yield rows
        return
    for members, scalars in rows:
        part: list[Member] = []
        total = 0
        for m in sorted(members, key=lambda m: m.param.shape):
            if part and total + m.param.numel() > _MOST_IN_BATCH:
                yield [_Rows(part, scalars)]
                part, total = [], 0
            part.append(m)
            total += m.param.numel()
        yield [_Rows(part, scalars)]


def _launch(kernel: registry.Kernel, rows: list[_Rows]) -> None:
    """All stages of these tensors."""
    stages, layout = staged.stages_of(kernel.signature)
    members = [m for kind in rows for m in kind.members]
    params = [m.param for m in members]
    grads = [_as_read(m) for m in members]
    buffers = [[m.state[name] for m in members] for name in kernel.signature.buffers]
    batches = [(batch, _operands(stages, batch, params)) for batch in stages.batches]
    blank = [0] * len(members)
    columns: list[Any] = [*zip(*[_shape(stages.of_matrices, p.shape) for p in params], strict=True)]
    columns += [map(Tensor.data_ptr, tensors) for tensors in (params, grads, *buffers)]
    for _, operands in batches:
        columns += [map(Tensor.data_ptr, operands), blank]
    table = array("q", chain.from_iterable(zip(*columns, strict=True)))
    zeros = [0.0] * (len(layout.slots) - len(kernel.signature.scalars) - len(stages.shapes))
    slots = array("d")
    for kind in rows:
        if stages.shapes:
            for m in kind.members:
                slots.extend([*kind.scalars.values(), *(of(m.param.shape) for of in stages.shapes.values()), *zeros])
        else:
            slots += array("d", [*kind.scalars.values(), *zeros]) * len(kind.members)
    run = _RUN(kernel.entry)

    def launch(first: int, last: int) -> None:
        run(len(members), table.buffer_info()[0], slots.buffer_info()[0], first, last, process.team_size())

    at = 0
    results: list[list[Tensor]] = []  # whose memory the table refers to
    for k, (batch, operands) in enumerate(batches):
        launch(at, (at := stages.stages[batch.node]) - 1)
        numbers = [rows[0].scalars[n] if isinstance(n, str) else n for n in batch.numbers]
        made = [t.to(operands[0].dtype).contiguous() for t in batch.function(operands, *numbers)]
        if [t.shape for t in made] != [p.shape for p in params]:
            got, expected = ([tuple(t.shape) for t in tensors] for tensors in (made, params))
            raise ValueError(f"{kernel.signature.rule.name}: a batch must keep its shapes {expected}, got {got}")
        results.append(made)
        column = layout.columns - 2 * (len(batches) - k) + 1
        for i, t in enumerate(made):
            table[i * layout.columns + column] = t.data_ptr()
    launch(at, max(part.stage for part in stages.parts))
    increment_version([t for t in (*params, *chain.from_iterable(buffers)) if not t.is_inference()])


def _as_read(m: Member) -> Tensor:
    """The gradient, contiguous and in the dtype that the kernel reads."""
    grad: Tensor = m.grad
    as_it_is = grad.dtype == m.param.dtype or grad.dtype == gradients.read_dtype(m.param, grad.dtype)
    plain = grad.is_contiguous() and not grad.is_neg()
    return grad if as_it_is and plain else gradients.like_parameter(m.param, grad)


@functools.lru_cache(maxsize=4096)
def _shape(of_matrices: bool, shape: torch.Size) -> tuple[int, int, int]:
    """How many matrices, and their rows and columns; elements are rows where these are not told apart."""
    return (shape[:-2].numel(), *shape[-2:]) if of_matrices else (1, shape.numel(), 1)


def _operands(stages: Stages, batch: Batch, params: list[Tensor]) -> list[Tensor]:
    """Memory for what a batch is given. Tensors of one shape lie side by side, in the order of the parameters."""
    dtype = stages.nodes[batch.operand][1]
    shapes = [p.shape for p in params]
    memory = {
        shape: iter(torch.empty(shapes.count(shape), *shape, dtype=dtype).unbind()) for shape in dict.fromkeys(shapes)
    }
    return [next(memory[shape]) for shape in shapes]
