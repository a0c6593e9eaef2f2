"""A rule as a program of few list operations, most of them in place.

The rule runs once per step on symbols, which record what it does with them. A record holds no number and no tensor, so
`_plan` is cached by it, while whatever the rule reads or decides in Python is read and decided anew in each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_optim._engine.one_pass import arithmetic_dtype
from compiled_optim._engine.record import Entry, Record
from compiled_optim._engine.rule import Rule, apply
from compiled_optim._engine.values import FUNCTIONS, IN_FOREACH, each

_GRADIENT = 1  # its place among the inputs, after the parameter


class _Step(NamedTuple):
    function: Callable[..., Any]
    operands: tuple[int, ...]
    result: int | None  # the cell that takes the result; None if the function writes it to its first operand
    dead: tuple[int, ...] = ()  # the cells that no later step reads


class _Constant(NamedTuple):
    place: int | None  # among the constants of the record; None stands for 1
    sign: int = 1
    dtype: torch.dtype | None = None  # of the 0-d tensor that the number becomes, if it is to be one


class Program:
    """One update of any number of tensors, by the scalars of one step.

    Its steps work on cells: first the inputs, then constants and temporaries (None).
    """

    def __init__(self, steps: list[_Step], cells: list[_Constant | None], constants: Sequence[Any]) -> None:
        self._steps = steps
        self.makes_temporaries = any(step.result is not None for step in steps)
        self._cells: list[Any] = []
        for cell in cells:
            value: Any = None
            if cell is not None:
                value = 1 if cell.place is None else constants[cell.place]
                value = value if cell.sign == 1 else -value
                if cell.dtype is not None:
                    value = torch.tensor(float(value), dtype=cell.dtype, device="cpu")
            self._cells.append(value)

    def run(self, columns: Sequence[Sequence[Tensor]]) -> None:
        """Updates in place.

        Args:
            columns: a list of parameters, of their gradients, and of each buffer.
        """
        cells = [*columns, *self._cells]
        for function, operands, result, dead in self._steps:
            made = function(*[cells[i] for i in operands])
            if result is not None:
                cells[result] = made
            for i in dead:
                cells[i] = None


def record(
    rule: Rule, on: Any, dtypes: Sequence[torch.dtype], device: torch.device, scalars: Mapping[str, Any]
) -> Program | None:
    """The program of an update, or None if that takes other things than numbers from outside, such as tensors.

    Args:
        on: the switches.
        dtypes: of the parameter, the gradient and the buffers, all of them real.
        device: of all.
        scalars: as `rule.evaluate` returns them.

    Raises:
        AttributeError, TypeError: for what a rule cannot do with a value.
    """
    buffers = rule.declaration.kept(on, dtypes[0])
    recorded = Record(dtypes, arithmetic_dtype(dtypes[0]))
    p, g, *state = recorded.inputs
    new, new_state = apply(rule, on, p, g, dict(zip(buffers, state, strict=True)), scalars)
    outputs = tuple(recorded.index(output, recorded.width) for output in (new, *new_state.values()))
    if not all(isinstance(number, int | float) for number in recorded.constants):
        return None
    steps, cells = _plan(tuple(dtypes), tuple(recorded.entries), outputs, device.type == "cpu")
    return Program(steps, cells, recorded.constants)


# ---- from a record to steps


@lru_cache(maxsize=256)
def _plan(
    dtypes: tuple[torch.dtype, ...], entries: tuple[Entry, ...], outputs: tuple[int, ...], on_cpu: bool
) -> tuple[list[_Step], list[_Constant | None]]:
    """The steps and the cells of a `Program`; ``outputs``: the indices of the new parameter and buffers."""
    nodes, outputs = _fuse([*[("input", dtype) for dtype in dtypes], *entries], outputs)
    emitter = _Emitter(nodes, outputs, len(dtypes), on_cpu)
    for i in nodes:
        emitter.emit(i)
    return emitter.finish(outputs)


def _fuse(nodes: list[Entry], outputs: tuple[int, ...]) -> tuple[dict[int, Entry], tuple[int, ...]]:
    """The entries that are needed, in their order, where a product or a quotient that is added is part of the sum.

    The third part of an entry is a sign: an addition of lists is "add" with the sign of the last term, the terms, and
    perhaps a factor of the last; "addcmul" and "addcdiv" have that of the product or the quotient. Of a
    "number" it is the place among the constants.
    """
    # copying into an output converts
    outputs = tuple(nodes[i][2] if nodes[i][0] == "to" else i for i in outputs)
    uses = Counter([*outputs, *(i for _, _, *operands in nodes for i in operands)])

    def inner(i: int, name: str) -> Any:
        return nodes[i][2:] if nodes[i][0] == name and uses[i] == 1 and i not in outputs else None

    found: dict[int, Entry] = {}
    constants = count()
    for i, (name, dtype, *operands) in enumerate(nodes):
        found[i] = (name, dtype, next(constants) if name == "number" else 1, *operands)
        if name not in ("add", "sub") or nodes[operands[1]][0] == "number":
            continue
        start, term = operands
        factor: tuple[int, ...] = ()
        if (product := inner(term, "mul")) and nodes[product[1]][0] == "number":
            term, factor = product[0], product[1:]
        fused = ("add", term)
        for operation, to in (("div", "addcdiv"), ("mul", "addcmul")):
            pair = inner(term, operation)
            if pair and not any(nodes[part][0] == "number" for part in pair) and (not factor or operation == "div"):
                fused = (to, *pair)
                break
        found[i] = (fused[0], dtype, 1 if name == "add" else -1, start, *fused[1:], *factor)
    needed = set(outputs)
    for i in reversed(found):
        if i in needed:
            needed.update(found[i][3:])
    return {i: node for i, node in found.items() if i in needed}, outputs


class _Emitter:
    """Gives each result a cell: that of an operand which nothing reads any more, or a temporary one."""

    def __init__(self, nodes: dict[int, Entry], outputs: tuple[int, ...], inputs: int, on_cpu: bool) -> None:
        self._nodes, self._inputs, self._on_cpu = nodes, inputs, on_cpu
        self._last = {operand: i for i, node in nodes.items() for operand in node[3:]}
        self._last |= dict.fromkeys(outputs, max(nodes) + 1)
        self._steps: list[_Step] = []
        self._cells: list[_Constant | None] = []
        self._cell_of: dict[int, int] = {}
        self._writable = {0, *range(_GRADIENT + 1, inputs)}
        self._free: list[int] = []

    def emit(self, i: int) -> None:
        name, dtype, sign, *operands = self._nodes[i]
        if name == "input":
            self._cell_of[i] = i
        elif name != "number":
            self._operation(i, name, dtype, sign, operands)

    def _operation(self, i: int, name: str, dtype: torch.dtype, sign: int, operands: list[int]) -> None:
        values = [o for o in operands if self._nodes[o][0] != "number"]
        numbers = [o for o in operands if self._nodes[o][0] == "number"]
        as_tensor = dtype if self._on_cpu and name in ("add", "mul", "div") and len(values) == 1 else None
        constants = [_Constant(self._nodes[o][2], sign, as_tensor) for o in numbers]
        if not numbers and name in ("add", "addcmul", "addcdiv"):
            constants = [_Constant(None, sign)]
        if name == "add" and len(values) == 1:
            name = "add_number"
        reusable = [o for o in values if self._may_overwrite(o, i, dtype)]
        in_place = name in _IN_PLACE and values[0] in reusable
        commutes = name in ("mul", "maximum", "minimum") or (name == "add" and constants == [_Constant(None)])
        if not in_place and commutes and len(values) == 2 and values[1] in reusable:
            values, in_place = values[::-1], True
        cells = [self._cell_of[o] for o in values] + [self._new_cell(constant) for constant in constants]
        result = None
        if in_place:
            self._cell_of[i] = cells[0]
        else:
            result = self._cell_of[i] = self._temporary()
        free = {self._cell_of[o] for o in values if self._last[o] == i} - {self._cell_of[i]}
        dead = tuple(cell for cell in free if cell >= self._inputs and cell in self._writable)
        function: Any = partial(_convert, dtype) if name == "to" else (_IN_PLACE if in_place else _NEW)[name]
        self._steps.append(_Step(function, tuple(cells), result, dead))
        self._free += dead

    def _may_overwrite(self, operand: int, i: int, dtype: torch.dtype) -> bool:
        is_last = self._last[operand] == i and self._nodes[operand][1] == dtype
        return is_last and self._cell_of[operand] in self._writable

    def _new_cell(self, constant: _Constant | None) -> int:
        self._cells.append(constant)
        return self._inputs + len(self._cells) - 1

    def _temporary(self) -> int:
        if self._free:
            return self._free.pop()
        cell = self._new_cell(None)
        self._writable.add(cell)
        return cell

    def finish(self, outputs: tuple[int, ...]) -> tuple[list[_Step], list[_Constant | None]]:
        """With copies of the outputs that are not in place."""
        targets = (0, *range(_GRADIENT + 1, self._inputs))
        moved = {t: at for t, o in zip(targets, outputs, strict=True) if (at := self._cell_of[o]) != t}
        for target, at in moved.items():
            if at in moved:  # and is overwritten by another copy
                moved[target] = self._new_cell(None)
                self._steps.append(_Step(each(torch.clone), (at,), moved[target]))
        self._steps += [_Step(torch._foreach_copy_, pair, None) for pair in moved.items()]
        return self._steps, self._cells


def _convert(dtype: torch.dtype, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(dtype) for t in tensors]


def _with_alpha(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensors, others, alpha: function(tensors, others, alpha=alpha)


def _with_number(function: Callable[..., Any]) -> Callable[..., Any]:
    # the overload for numbers takes a 0-d tensor too, and is slow
    return lambda tensors, n: function(tensors, n, alpha=1.0) if isinstance(n, Tensor) else function(tensors, n)


_NEW = {
    **FUNCTIONS,
    "add": _with_alpha(torch._foreach_add),
    "add_number": _with_number(torch._foreach_add),
    "addcdiv": torch._foreach_addcdiv,
}
_IN_PLACE = {name: getattr(torch, f"_foreach_{name}_") for name in (*IN_FOREACH, "addcdiv")}
_IN_PLACE |= {
    "add": _with_alpha(torch._foreach_add_),
    "add_number": _with_number(torch._foreach_add_),
    "masked_fill": each(Tensor.masked_fill_),
}
