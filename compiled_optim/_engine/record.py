"""What a rule does with values, recorded: a list of entries that holds no number and no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compiled_optim._engine.values import Value

# An entry of a record: a name, the dtype of its result, and the indices of its operands. Inputs come first.
Entry = tuple[Any, ...]
_COMPARISONS = ("gt", "lt", "eq", "ne")


class Symbol(Value):
    """The result of one entry of a record."""

    __slots__ = ("_record", "dtype", "index")

    def __init__(self, record: Record, index: int, dtype: torch.dtype) -> None:
        self._record, self.index, self.dtype = record, index, dtype

    def to(self, dtype: torch.dtype) -> Symbol:
        return self if dtype == self.dtype else self._record.add("to", dtype, self)

    def _apply(self, name: str, *operands: Any) -> Symbol:
        if name == "sub" and isinstance(operands[0], int | float):
            return self._apply("add", -operands[0])
        dtype = self.dtype
        for operand in operands:
            if isinstance(operand, Symbol) and name not in ("where", "masked_fill"):
                dtype = torch.promote_types(dtype, operand.dtype)
        if name in _COMPARISONS:
            dtype = torch.bool
        elif dtype is torch.bool:
            return self.to(self._record.width)._apply(name, *operands)
        return self._record.add(name, dtype, self, *operands)


class Record:
    """The entries of a rule on inputs of these dtypes, whose arithmetic has the dtype ``width``."""

    symbol = Symbol

    def __init__(self, dtypes: Sequence[torch.dtype], width: torch.dtype) -> None:
        self.width = width
        self.entries: list[Entry] = []
        self.constants: list[Any] = []
        self.inputs = [self.symbol(self, i, dtype) for i, dtype in enumerate(dtypes)]

    def add(self, name: str, dtype: torch.dtype, *operands: Any) -> Symbol:
        at = [self.index(operand, dtype) for operand in operands]
        self.entries.append((name, dtype, *at))
        return self.symbol(self, len(self.inputs) + len(self.entries) - 1, dtype)

    def index(self, operand: Any, dtype: torch.dtype) -> int:
        """Of a symbol, or of the "number" that another operand becomes: the next of ``constants``."""
        if isinstance(operand, Symbol) and operand._record is self:
            return operand.index
        self.constants.append(operand)
        return self.add("number", dtype).index
