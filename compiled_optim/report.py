"""``explain``: how an optimizer's steps run, and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch

from compiled_optim._engine.executions.dispatch import Execution
from compiled_optim._engine.kernels import cost
from compiled_optim._engine.kernels.trace import Signature
from compiled_optim.optimizer import Optimizer


@dataclass(frozen=True)
class Row:
    """A part of a step.

    Attributes:
        execution: "multi_tensor", "foreach", "lbfgs" or "eager".
        device, dtype: of the parameters.
        tensors, elements: how many parameters, and real elements in them.
        launches: kernel launches in a step; None where it is not known (eager).
        bytes_per_element: memory traffic of one element in a step; None where it is not known.
        kernel: its name.
        origin: "compiled" in this process, "disk" or "memory"; empty for eager parts.
        seconds: from the request to the loaded kernel.
        reason: why it runs this way.
        bytes, operations, milliseconds: of a step as the cost model has them, the last at the bandwidth that `explain`
            was given; None without one, and where no model is known.
    """

    execution: str
    device: str
    dtype: str
    tensors: int
    elements: int
    launches: int | None
    bytes_per_element: int | None
    kernel: str
    origin: str
    seconds: float
    reason: str
    bytes: int | None = None
    operations: int | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class StateMemory:
    """The buffers that parameters of one kind have.

    Attributes:
        dtype: of the parameters. elements: in them, a complex one counts once.
        bytes_per_element: of all buffers together.
        buffers: their dtypes by name.
    """

    dtype: str
    elements: int
    bytes_per_element: int
    buffers: dict[str, str]

    def __str__(self) -> str:
        named = ", ".join(f"{name} {dtype}" for name, dtype in self.buffers.items())
        return f"state of {self.elements} {self.dtype} elements: {self.bytes_per_element} bytes each ({named})"


_SUMMED = ("tensors", "elements", "launches", "bytes", "operations", "milliseconds")
_COSTS = 3  # how many fields of a row, the last, say what a step costs


class Explanation:
    """The rows of `explain`, to iterate over or to print.

    Attributes:
        rows: a `Row` for each part of the step.
        rebuilt: why each of the last plans was made, the newest last.
        state: a `StateMemory` for each kind of parameter that has buffers.
        notes: what else a step does, such as calling a function of yours for the schedule that is attached.
    """

    def __init__(self, rows: list[Row], rebuilt: list[str], state: Sequence[StateMemory] = ()) -> None:
        self.rows, self.rebuilt, self.state = rows, rebuilt, list(state)
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        table = [tuple(f.name for f in fields(Row)), *(tuple(_text(v) for v in astuple(row)) for row in self.rows)]
        if all(row.milliseconds is None for row in self.rows):
            table = [row[:-_COSTS] for row in table]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join(
            [
                *lines,
                *map(str, self.state),
                *(f"plan {i + 1}: {why}" for i, why in enumerate(self.rebuilt)),
                *self.notes,
            ]
        )


def explain(optimizer: torch.optim.Optimizer, *, bandwidth: float | None = None) -> Explanation:
    """How the last step of ``optimizer`` ran: one row for each kernel, graph, or reason to run eagerly.

    Args:
        optimizer: of this package, or what wraps one: an optimizer that Lightning, Fabric or Accelerate returns, a
            ZeroRedundancyOptimizer, or any other object with an attribute that is one.
        bandwidth: of memory, in GB/s. With it the rows of kernels also say what a step moves, computes, and how long it
            takes if memory is what bounds it. That traces the rules again, which takes seconds the first time.

    Raises:
        TypeError: if it is not an optimizer of this package, and holds none.
        ValueError: if the bandwidth is not positive.

    Example:
        >>> import torch
        >>> from compiled_optim import AdamW, explain
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> weight.grad = torch.ones(3)
        >>> optimizer = AdamW([weight])
        >>> optimizer.step()
        >>> [(row.execution, row.elements, row.reason) for row in explain(optimizer)]
        [('eager', 3, 'compiled=False')]
    """
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth must be above 0 GB/s, got {bandwidth!r}")
    optimizer = _unwrapped(optimizer)
    found = _explain(optimizer, bandwidth)
    if optimizer.rule.declaration.options:
        found.state = _memory(optimizer)
        if optimizer._attached is not None and (note := optimizer._attached.note):
            found.notes.append(note)
    return found


def _explain(optimizer: Optimizer, bandwidth: float | None) -> Explanation:
    execution: Any = optimizer._execution
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    if not optimizer._compiled:
        return Explanation(_eager_rows(everything, "compiled=False"), [])
    if execution is None or (isinstance(execution, Execution) and not any(p.has_stepped for p in execution.parts)):
        return Explanation(_eager_rows(everything, "no step was taken yet"), [])
    if not isinstance(execution, Execution):  # that of LBFGS
        rows, k = _eager_rows(everything, execution.reason), execution.kernels
        if not execution.reason:
            rows = [replace(r, execution="lbfgs", kernel=k.name, origin=k.origin, seconds=k.seconds) for r in rows]
        return Explanation(rows, [])
    parts = execution.parts
    rows = [row for part in parts for row in _rows(part, bandwidth)]
    rebuilt = [why for part in parts for why in part.rebuilt]
    return Explanation(_summed(rows), rebuilt if len(parts) == 1 else [*dict.fromkeys(rebuilt)])


def _rows(execution: Execution, bandwidth: float | None) -> list[Row]:
    if execution.reason:
        return _eager_rows(execution.params, execution.reason)
    rows = [
        Row(
            "foreach",
            ", ".join(map(str, g.devices)),
            ", ".join(map(_dtype, g.dtypes)),
            *(g.tensors, g.elements, g.launches, None),
            *(g.name, g.origin, g.seconds, ""),
        )
        for g in execution.graphs
    ]
    plan = execution.plan or execution.staged
    if plan is not None:
        for launch in plan.launches:
            k = launch.kernel
            where = ("multi_tensor", str(launch.device), _dtype(launch.dtype))
            size = (launch.tensors, launch.elements, launch.launches, k.bytes_per_element)
            row = Row(*where, *size, k.signature.name, k.origin, k.seconds, "")
            rows.append(row if bandwidth is None else _with_cost(row, k.signature, bandwidth))
        for reason in dict.fromkeys(why for _, _, why in plan.elsewhere):
            rows += _eager_rows([p for _, p, why in plan.elsewhere if why == reason], reason)
    return rows


def _summed(rows: list[Row]) -> list[Row]:
    """One row for what blocks of parameters have in common."""
    alike: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        alike[tuple(getattr(row, f.name) for f in fields(Row) if f.name not in _SUMMED)].append(row)
    return [_sum(kind) for kind in alike.values()]


def _sum(rows: list[Row]) -> Row:
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in _SUMMED}
    sums: dict[str, Any] = {name: None if None in column else sum(column) for name, column in columns.items()}
    return replace(rows[0], **sums)


def _with_cost(row: Row, signature: Signature, bandwidth: float) -> Row:
    if not signature.rule.elementwise:
        moved = row.elements * (row.bytes_per_element or 0)  # what stages read again is counted again
        return replace(row, bytes=moved, milliseconds=moved / bandwidth / 1e6)
    found = cost.of(signature)
    sizes = row.elements, row.tensors
    moved, computed = (int(found.at(e, *sizes)) for e in (found.bytes, found.arithmetic))
    milliseconds = found.at(found.seconds, *sizes, bandwidth * 1e9) * 1e3
    return replace(row, bytes=moved, operations=computed, milliseconds=milliseconds)


def _memory(optimizer: Optimizer) -> list[StateMemory]:
    elements: Counter[Any] = Counter()
    for p in [p for group in optimizer.param_groups for p in group["params"]]:
        state = optimizer.state.get(p, {})
        buffers = {name: state[name].dtype for name in optimizer.rule.declaration.buffers if name in state}
        if buffers:
            elements[p.dtype, tuple(buffers.items())] += p.numel()
    return [
        StateMemory(_dtype(dtype), n, sum(d.itemsize for _, d in buffers), {k: _dtype(d) for k, d in buffers})
        for (dtype, buffers), n in elements.items()
    ]


def _unwrapped(wrapper: Any) -> Optimizer:
    found = _innermost(wrapper, set())
    if found is None:
        raise TypeError(f"optimizer must be a compiled_optim.Optimizer, or hold one, got {type(wrapper).__name__}")
    return found


def _innermost(wrapper: Any, seen: set[int]) -> Optimizer | None:
    """The innermost optimizer of this package. A wrapper may be of its class, but it is not the wrapper that steps."""
    seen.add(id(wrapper))
    is_ours = isinstance(wrapper, Optimizer)
    held = [getattr(wrapper, name, None) for name in ("_optimizer", "optimizer")]
    if not is_ours:  # an optimizer of ours that holds another under a name of its own may step both
        held += [v for v in getattr(wrapper, "__dict__", {}).values() if isinstance(v, torch.optim.Optimizer)]
    inner = (_innermost(one, seen) for one in held if one is not None and id(one) not in seen)
    return next((found for found in inner if found is not None), wrapper if is_ours else None)


def _eager_rows(params: list[Any], reason: str) -> list[Row]:
    kinds = dict.fromkeys((str(p.device), p.dtype) for p in params)
    rows = []
    for device, dtype in kinds:
        members = [p for p in params if (str(p.device), p.dtype) == (device, dtype)]
        elements = sum(p.numel() for p in members)
        rows.append(Row("eager", device, _dtype(dtype), len(members), elements, None, None, "", "", 0.0, reason))
    return rows


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _text(value: Any) -> str:
    return "-" if value is None or value == "" else f"{value:.2f}" if isinstance(value, float) else str(value)
