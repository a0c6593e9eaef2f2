"""A launch plan: which kernel updates which tensors of an optimizer. Every step checks it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from compiled_optim._engine.declaration import Group
from compiled_optim._engine.executions import dtensors, gradients
from compiled_optim._engine.executions.checks import COUNT_DTYPES, PLAIN, is_count
from compiled_optim._engine.executions.state import Journal, counted_on_device, withdraw
from compiled_optim._engine.executions.survey import Member, commit, look
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.kernels import registry
from compiled_optim._engine.kernels.backends import backend_named, backend_of, is_capturing
from compiled_optim._engine.kernels.prologue import constants_of
from compiled_optim._engine.kernels.references import Form, UnknownReferenceError, all_references, refer_to
from compiled_optim._engine.kernels.trace import Signature
from compiled_optim._engine.torch_private import inductor, tensor_parts

_NO_LAUNCH, _NO_STATE = -1, -2  # as in host/plan.h

# A param group and the counts of a step. A row adds the scalars, and the scalars that are carried to the next step.
# Where the counts lie on a device, the group is a negative number for a launch and a group (`Plan.of_device`), and the
# row has what the kernel computes scalars from; numbers may be tensors on the device.
Counts = tuple[int, tuple[float, ...]]
Row = tuple[int, tuple[float, ...], tuple[Any, ...]]


@dataclass
class Launch:
    """What one kernel does in a step on one device; complex elements count as two.

    ``context`` returns the last argument of the kernel's entry in the next step, given `Work.factor` if there is one.
    ``launches`` are those of a step.
    """

    kernel: registry.Kernel
    dtype: torch.dtype
    device: torch.device
    context: Callable[..., int] = int
    launches: int = 1
    tensors: int = 0
    elements: int = 0


@dataclass
class Plan:
    """The tables of one optimizer.

    ``elsewhere``: parameters that no kernel takes, with their param group and the reason; ``in_graphs``: those of them
    that a graph over lists updates. ``copied``: those whose gradient is laid out otherwise than they are, or in a dtype
    that no kernel reads; ``sparse``: those of which it touches some rows only; ``sharded``: those that are DTensors, in
    whose stead the host module is shown the shards of this process. ``scaled``: whether a launch divides gradients by a
    scale. ``journal``: the state that was made for it, until it has run; ``frozen``: the functions that kernels were
    traced from; ``references``: what these refer to, None if that cannot change.
    """

    host: Any
    native: Any
    switches: list[Any]
    frozen: tuple[Callable[..., Any], ...]
    references: Form | None
    launches: list[Launch] = field(default_factory=list)
    elsewhere: list[tuple[int, Tensor, str]] = field(default_factory=list)
    in_graphs: list[tuple[int, Tensor]] = field(default_factory=list)
    copied: list[Tensor] = field(default_factory=list)
    sparse: list[Tensor] = field(default_factory=list)
    sharded: list[Tensor] = field(default_factory=list)
    launch_of: dict[Any, int] = field(default_factory=dict)
    journal: Journal = field(default_factory=list)
    scaled: bool = False

    def is_current(self, work: Work) -> bool:
        """Whether the rule is still the one that was compiled, and still refers to the same values."""
        functions = work.rule.frozen(len(self.frozen) > 1)
        return functions == self.frozen and (self.references is None or refer_to(functions, self.references))

    def of_device(self, code: int) -> tuple[Launch, int]:
        """The launch and the param group that a negative number in `Counts` stands for, as in host/plan.h."""
        launch, group = divmod(-1 - code, len(self.switches))
        return self.launches[launch], group

    @property
    def skips(self) -> bool:
        """Whether the step is nothing but launches that a number on their device can skip."""
        return not (self.elsewhere or self.in_graphs) and all(it.kernel.signature.on_device for it in self.launches)

    @property
    def scales(self) -> bool:
        """Whether they can divide gradients by a scale, too, and write them back."""
        return self.skips and not (self.copied or self.sparse or self.sharded)

    def device_row(self, work: Work, code: int, counts: tuple[float, ...], choices: list[Group]) -> Row:
        """What a kernel `on_device` is given of one param group: see `hypers_of`; then whether the step is skipped."""
        launch, group = self.of_device(code)
        scaling, h = work.scaling, choices[group].hyper
        values = [getattr(h, name) for name in work.rule.declaration.numbers]
        if not work.rule.declaration.counts:
            values.append(counts[0])
        values += [work.given[name] for name in work.rule.extras.numbers]
        if launch.kernel.signature.scaled and scaling is not None:
            values.append(scaling.grad_scale)
        values.append(0.0 if scaling is None or scaling.found_inf is None else scaling.found_inf)
        return code, counts, tuple([_on(launch.device, v) if isinstance(v, Tensor) else v for v in values])

    def run(self, work: Work, rows: list[Row]) -> str | list[Counts] | None:
        """One step in one call of the host module, with the scalars that it is expected to need.

        Returns:
            None; or, when nothing was written, what no longer holds, or the counts whose scalars are needed.
        """
        listed = [group["params"] for group in work.groups]
        lists = tuple([params if type(params) is list else list(params) for params in listed])
        # A gradient that became sparse is not converted: the host module then says that the plan no longer fits.
        copied = [(p, grad) for p in self.copied if (grad := work.gradient(p)) is not None and not grad.is_sparse]
        stand_ins: list[tuple[Tensor, ...]] = list((work.substitutes or {}).items())
        if copied:  # the host module names a gradient whose storage is too short
            stand_ins += [(p, gradients.like_parameter(p, grad)) for p, grad in copied if self.host.is_whole(grad)]
        for p in self.sparse:
            if p.grad is not None and p.grad.is_sparse:
                values, indices = (tensor_parts.sparse_parts if p.is_cpu else tensor_parts.touched_rows)(p.grad)
                stand_ins.append((p, values.contiguous() if self.host.is_whole(values) else values, indices))
            elif p.grad is not None and not work.rule.accepts_dense:
                return "a gradient is dense"
        state: Any = work.state
        if self.sharded:
            lists = tuple([[dtensors.local(p) for p in params] for params in lists])
            state = _local_states(work)
            stand_ins = [stand_in for stand_in in stand_ins if not tensor_parts.is_dtensor(stand_in[0])]
            stand_ins += self._shards_of_gradients(work)
        factor = work.factor
        contexts = tuple(
            [it.context() if factor is None or it.device.type == "cpu" else it.context(factor) for it in self.launches]
        )
        outcome: Any
        outcome = self.host.run(self.native, lists, state, rows, stand_ins, contexts)
        if outcome is False:  # a scalar is no float: converting it runs Python, which may replace gradients
            given = {id(stand_in[0]) for stand_in in stand_ins}
            left = [p for params in lists for p in params if p.grad is not None and id(p) not in given]
            stand_ins += [(p, p.grad) for p in left]
            rows = [row if row[0] < 0 else (*row[:2], tuple(map(float, row[2]))) for row in rows]
            outcome = self.host.run(self.native, lists, state, rows, stand_ins, contexts)
        if outcome is None and self.journal:
            self.journal.clear()
        if self.sharded and outcome is None:
            increment_version([p for p in self.sharded if work.gradient(p) is not None])
        return outcome  # type: ignore[no-any-return]

    def _shards_of_gradients(self, work: Work) -> list[tuple[Tensor, Tensor]]:
        given = [(p, grad) for p in self.sharded if (grad := work.gradient(p)) is not None]
        shards = [(dtensors.local(p), dtensors.local_gradient(p, grad)) for p, grad in given]
        host = self.host
        as_they_are = [gradients.is_read_as_it_is(host, p, grad) or not host.is_whole(grad) for p, grad in shards]
        pairs = zip(shards, as_they_are, strict=True)
        return [(p, grad if as_it_is else gradients.like_parameter(p, grad)) for (p, grad), as_it_is in pairs]


def make_plan(
    work: Work,
    choices: list[Group],
    scalar_names: list[tuple[str, ...]],
    refused: Callable[[list[tuple[Tensor, str]]], None],
    in_graph: Callable[[Tensor], bool] = lambda p: False,
) -> Plan:
    """Sorts the parameters by kernel, obtains the kernels, and makes the missing state when nothing can fail any more.

    Args:
        choices: the hyperparameters and switches of each param group; scalar_names: of the scalars of each.
        refused: told of the parameters that no kernel takes, and why, before any state is made.
        in_graph: whether a parameter that no kernel takes is updated by a graph instead, of which nobody is told.

    Raises:
        inductor.LoweringError: if the rule refers to what could change unnoticed.
        What `look`, `registry.get` and ``refused`` raise.
    """
    members = _sorted_by_kernel(work, choices, scalar_names)
    on_device = any(m.signature.on_device for m in members if m.signature)
    host, found = registry.get([m.signature for m in members if m.grad is not None and m.signature])
    frozen = work.rule.frozen(on_device)
    declaration = work.rule.declaration
    native = host.make(declaration.slots, len(declaration.counts))
    plan = Plan(host, native, [c.switches for c in choices], frozen, references_of(work, on_device))
    for m in members:
        m.reason = m.reason or _host_reason(host, m)
    _leave_shared_memory(work, host, [m for m in members if m.grad is not None])
    plan.sharded = [m.listed for m in members if m.param is not m.listed]
    plan.in_graphs = [(m.group, m.listed) for m in members if m.reason and in_graph(m.param)]
    plan.elsewhere = [(m.group, m.listed, m.reason) for m in members if m.reason and not in_graph(m.param)]
    refused([(p, reason) for _, p, reason in plan.elsewhere])
    taken = {
        id(m): found[m.signature]
        for m in members
        if not m.reason and m.signature in found and (m.grad is not None or not m.lacks)
    }
    if any(m.lacks and is_capturing(m.param.device) for m in members if id(m) in taken):
        raise RuntimeError(
            f"a CUDA graph cannot capture the first step of {work.rule.name}, which makes its state: each replay would "
            "make it again. Take a step before the capture"
        )
    entries: list[list[tuple[Tensor, int, bool]]] = [[] for _ in choices]
    try:
        commit(work, choices, [m for m in members if id(m) in taken], plan.journal)
        for m in members:
            launch = _NO_LAUNCH if m.reason else _NO_STATE
            if id(m) in taken:
                launch = _launch_of(plan, declaration.slots, m, taken[id(m)])
                if m.grad is not None and m.grad.is_sparse:
                    plan.sparse.append(m.param)
                elif (
                    m.grad is not None and m.param is m.listed and not gradients.is_read_as_it_is(host, m.param, m.grad)
                ):
                    plan.copied.append(m.param)
            entries[m.group].append((m.param, launch, launch >= 0 and m.fresh))
        for its in plan.launches:
            signature = its.kernel.signature
            prepare = backend_named(signature.backend).contexts
            its.context = prepare(its.kernel.keepalive, signature, its.device, its.tensors)
        for group in entries:
            host.add_group(native, group)
        host.seal(native, _local_states(work) if plan.sharded else work.state)
    except BaseException:
        withdraw(work, plan.journal)
        raise
    return plan


def expected(work: Work, choices: list[Group], scalar_names: list[tuple[str, ...]]) -> list[Signature]:
    """The kernels that the next step needs: of the parameters that have a gradient, or if none has, of all trained."""
    members = _sorted_by_kernel(work, choices, scalar_names)
    active = [m for m in members if m.grad is not None] or [m for m in members if m.param.requires_grad]
    return [m.signature for m in active if m.signature]


def _sorted_by_kernel(work: Work, choices: list[Group], scalar_names: list[tuple[str, ...]]) -> list[Member]:
    """All parameters with the signature of their kernel or the reason why they have none.

    This needs no host module, so that it and the kernels can be compiled side by side.
    """
    references = functools.cache(functools.partial(references_of, work))
    members = look(work, choices, idle=True)
    occurrences = Counter(id(m.param) for m in members)
    for m in members:
        p, choice = m.param, choices[m.group]
        m.reason = "it is listed more than once" if occurrences[id(p)] > 1 else reason_of(work, choice, m)
        if not m.reason:
            default = work.rule.declaration.dtype_of
            of_state = [default(n, p.dtype) if (t := m.state[n]) is None else t.dtype for n in m.buffers]
            dtypes = tuple(dtype.to_real() for dtype in (p.dtype, *of_state))
            backend = backend_of(p)
            assert backend is not None
            given = gradients.dtype_of(m).to_real()
            m.signature = Signature(
                *(work.rule, choice.switches, dtypes, m.buffers, scalar_names[m.group], references(False)),
                backend=backend.name,
                grad_dtype=None if given == dtypes[0] else given,
            )
            if backend.asynchronous:
                m.signature = _for_device(work, choice, m, m.signature)
            if m.signature.on_device:
                m.signature = replace(m.signature, references=references(True))
    return members


def _for_device(work: Work, choice: Group, m: Member, signature: Signature) -> Signature:
    """The signature of a kernel for which the host need not wait, if the counts of a parameter lie beside it."""
    by_rows = m.grad is not None and m.grad.is_sparse
    if not _is_counted_there(work, m):
        return replace(signature, by_rows=by_rows)
    return replace(
        signature,
        on_device=True,
        constants=constants_of(signature, choice.hyper),
        scaled=work.scaling is not None and work.scaling.grad_scale is not None,
        by_rows=by_rows,
    )


def _is_counted_there(work: Work, m: Member) -> bool:
    """Whether the step counts of a parameter lie on its device, or will; where there are none, whether they would."""
    count = m.state.get(m.counts[0]) if m.counts else None
    if count is not None:
        return bool(count.device == m.param.device)
    return counted_on_device(work.groups[m.group])


def references_of(work: Work, on_device: bool) -> Form | None:
    """What the functions that a kernel is traced from refer to, None if that cannot change.

    Raises:
        inductor.LoweringError: if it could change unnoticed.
    """
    try:
        return all_references(work.rule.frozen(on_device))
    except UnknownReferenceError as error:
        what = "the update or the scalars" if on_device else "the update"
        raise inductor.LoweringError(
            f"{what} of {work.rule.name} refers to {error}: no change of it would be seen"
        ) from error


def reason_of(work: Work, choice: Group, m: Member) -> str:
    """Why no kernel takes a parameter, or an empty string."""
    p = m.param
    if type(p) not in PLAIN:
        return f"its type is {type(p).__name__}"
    backend = backend_of(p)
    if backend is None:
        return f"it is {p.dtype} on {p.device.type}"
    grad = m.grad if m.param is not m.listed else work.gradient(p)  # not the copy in COO layout
    if grad is None or (type(grad) in PLAIN and grad.layout is torch.strided):
        return ""
    if type(grad) not in PLAIN or grad.layout is not torch.sparse_coo:
        return f"its gradient is a {type(grad).__name__} with layout {grad.layout}"
    if not backend.sparse:
        return f"its gradient is sparse and kernels on {backend.name} update every row"
    if work.rule.rounds(p.dtype):
        return "its gradient is sparse, and rounding at random depends on the place in the whole parameter"
    if not work.rule.keeps_untouched_rows(choice.switches):
        return "its gradient is sparse and these options update every row"
    if p.is_complex() or not p.is_contiguous() or grad.dtype != gradients.read_dtype(p, grad.dtype):
        return f"its gradient is sparse, {grad.dtype} for a {p.dtype} parameter, and rows are taken of contiguous reals"
    return ""


def _host_reason(host: Any, m: Member) -> str:
    """Why the host module does not take a parameter and its state, or an empty string."""
    reason: str | None = host.refusal(m.param)
    if reason or m.signature is None:
        return reason or ""
    for name in m.buffers:
        buffer = m.state[name]
        if buffer is not None and not host.matches(buffer, m.param):
            return f"its state {name!r} has another layout or device"
    for name in m.counts:
        count = m.state.get(name)
        if isinstance(count, Tensor) and (not is_count(count) or host.refusal(count)):
            return f"its state {name!r} is a {count.dtype} tensor of shape {tuple(count.shape)} on {count.device}"
    return ""


def _leave_shared_memory(work: Work, host: Any, active: list[Member]) -> None:
    """Takes parameters out of the launch whose shared memory would make it differ from a loop over parameters."""
    slots, counts = work.rule.declaration.slots, work.rule.declaration.counts
    described = [(bool(m.reason), m.param, m.grad, tuple(m.state.get(name) for name in slots)) for m in active]
    for m, reason in zip(active, host.conflicts(described, len(counts)), strict=True):
        m.reason = m.reason or reason or ""


def _launch_of(plan: Plan, slots: tuple[str, ...], m: Member, kernel: registry.Kernel) -> int:
    """The index of the launch that takes a tensor: each device has its own, and so have complex tensors."""
    dtypes, device = (m.param.dtype, *(m.state[name].dtype for name in kernel.signature.buffers)), m.param.device
    index = plan.launch_of.setdefault((kernel.signature, dtypes, device), len(plan.launches))
    if index == len(plan.launches):
        signature = kernel.signature
        backend = backend_named(signature.backend)
        plan.launches.append(Launch(kernel, m.param.dtype, device, launches=1 + signature.on_device))
        samples = {slots.index(name): m.state[name] for name in signature.buffers}
        plan.scaled = plan.scaled or signature.scaled
        differs = (signature.on_device, signature.by_rows, signature.scaled, *gradients.samples(m.param, signature))
        plan.host.add_launch(plan.native, kernel.entry, m.param, samples, backend.long_launch, *differs)
    launch = plan.launches[index]
    launch.tensors += 1
    launch.elements += m.param.numel() * (2 if m.param.is_complex() else 1)
    return index


def _on(device: torch.device, value: Tensor) -> Tensor | float:
    """A number that a kernel on a device reads there, or by value where the host need not wait for it."""
    if value.is_cpu:
        return value.item()
    return value.to(device, value.dtype if value.dtype in COUNT_DTYPES else torch.float64, non_blocking=True)


def _local_states(work: Work) -> dict[Tensor, dict[str, Any]]:
    buffers = work.rule.declaration.buffers
    return {dtensors.local(p): dtensors.local_state(p, state, buffers) for p, state in work.state.items()}
