"""Memory that tensors share. Updates that overlap run one after the other, as in a loop over parameters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, itemgetter

from torch import Tensor

_is_sparse, _first = attrgetter("is_sparse"), itemgetter(0)
Span = tuple[int, int, int, bool]  # begin and end in bytes, the index of the update, whether the update writes it


class ShortStorageError(RuntimeError):
    """The elements of ``tensor`` are not all in memory."""

    def __init__(self, tensor: Tensor, message: str) -> None:
        super().__init__(message)
        self.tensor = tensor


class Memory:
    """Finds which updates of a step must wait for others.

    It lives from step to step, so that addresses are sorted only when they change.
    """

    def __init__(self) -> None:
        self._written: list[int] = []  # addresses and sizes
        self._read: list[int] = []
        self._begins: list[int] = []  # of the written spans, sorted
        self._ends: list[int] = []
        self._clashes = False

    def turns(self, written: Sequence[Sequence[Tensor]], read: Sequence[Tensor]) -> list[int]:
        """The turn of each update, from 0 on. Updates of one turn can be done in any order.

        Args:
            written: the parameter of each update, and its state.
            read: the gradient of each.

        Raises:
            ShortStorageError: for a tensor whose storage was resized and does not hold it any more.
        """
        addresses = [*_addresses([*chain(*written)]), *map(Tensor.numel, map(_first, written))]
        if addresses != self._written:
            self._sort(written)
            self._written, self._read = addresses, []
        dense = [t for t in read if not t.is_sparse] if any(map(_is_sparse, read)) else read
        read_at = _addresses(dense)
        if read_at != self._read and not self._clashes:
            self._clashes = self._is_written(dense, read_at)
        self._read = read_at
        if not self._clashes:
            return [0] * len(written)
        self._written = []  # so the next step looks again
        return _in_order(written, read)

    def _sort(self, written: Sequence[Sequence[Tensor]]) -> None:
        spans = sorted(span for t in chain(*written) if (span := _span(t)))
        self._begins, self._ends = [begin for begin, _ in spans], [end for _, end in spans]
        overlap = any(end > begin for end, begin in zip(self._ends, self._begins[1:], strict=False))
        self._clashes = overlap or len({id(row[0]) for row in written}) < len(written)

    def _is_written(self, read: Sequence[Tensor], addresses: list[int]) -> bool:
        begins, ends = self._begins, self._ends
        held = all([t.untyped_storage().nbytes() >= t.nbytes for t in read]) if 0 not in addresses else False  # noqa: C419
        if held and all(map(Tensor.is_contiguous, read)):
            spans = [(at, at + t.nbytes) for at, t in zip(addresses, read, strict=True)]
        else:
            spans = [span for t in read if (span := _span(t))]
        # Written spans do not overlap here, so the last one that begins before an end also reaches furthest.
        before = [bisect_left(begins, end) for _, end in spans]
        return any(ends[i - 1] > begin for i, (begin, _) in zip(before, spans, strict=True) if i)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [*map(Tensor.data_ptr, tensors)]
    except RuntimeError:  # a subclass may have no memory of its own
        return [*map(_address, tensors)]


def _address(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:
        return 0


def _span(t: Tensor) -> tuple[int, int] | None:
    """The bytes from the first element to the last, or None if there are none to share."""
    if t.is_sparse or t.is_meta or not t.numel():
        return None
    try:
        address, storage = t.data_ptr(), t.untyped_storage().nbytes()
    except RuntimeError:  # a subclass may have no memory of its own
        return None
    elements = t.numel()
    if not t.is_contiguous():
        elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    needed = (t.storage_offset() + elements) * t.element_size()
    if storage < needed:
        raise ShortStorageError(t, f"needs a storage of {needed} bytes, and its storage has {storage}")
    return address, address + elements * t.element_size()


def check_storage(t: Tensor) -> None:
    """Raises ShortStorageError for a tensor whose elements are not all in memory."""
    _span(t)


def _in_order(written: Sequence[Sequence[Tensor]], read: Sequence[Tensor]) -> list[int]:
    spans: list[Span] = []
    for i, (row, grad) in enumerate(zip(written, read, strict=True)):
        spans += [(*span, i, t is not grad) for t in (*row, grad) if (span := _span(t))]
    spans.sort()
    earlier: list[set[int]] = [set() for _ in read]
    open_spans: list[Span] = []
    for begin, end, i, writes in spans:
        open_spans = [span for span in open_spans if span[1] > begin]
        for _, _, j, also_writes in open_spans:
            if i != j and (writes or also_writes):
                earlier[max(i, j)].add(min(i, j))
        open_spans.append((begin, end, i, writes))
    last: dict[int, int] = {}  # the previous place of a parameter that is listed twice
    for i, row in enumerate(written):
        if id(row[0]) in last:
            earlier[i].add(last[id(row[0])])
        last[id(row[0])] = i
    turns: list[int] = []
    for before in earlier:
        turns.append(max((turns[i] + 1 for i in before), default=0))
    return turns
