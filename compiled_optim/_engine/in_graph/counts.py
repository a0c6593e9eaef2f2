"""Step counts, and other 0-d state, of an optimizer whose rule is traced into a user's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Count = tuple[float, ...]  # as `Member.next_counts` returns it


class HostCounts:
    """The counts of all parameters as views of one vector, which an operator reads and advances on the host.

    For 150 parameters that takes 5 us, or 1 us while they are equal. One by one it would take 150 us.

    Args:
        names: of the 0-d state, the step count first; none for an algorithm that keeps no count.
        groups: the param group of each parameter.
        states: the state of each parameter; the views take their places in it.
    """

    def __init__(
        self, names: Sequence[str], dtype: torch.dtype, groups: list[int], states: list[dict[str, Any]]
    ) -> None:
        self._groups, self._states = groups, states
        self._vectors = {name: torch.zeros(len(states), dtype=dtype, device="cpu") for name in names}
        self._views = {name: vector.unbind() for name, vector in self._vectors.items()}
        self.placed: set[int] = set()  # the parameters whose counts these are
        self.fresh: set[int] = set()  # parameters whose buffers are new
        self._equal: list[Count | None] = []  # per param group; None if its counts differ
        self._are_equal: tuple[bool, ...] = ()
        self._each: list[Count] = []
        self._seen: int | None = None

    def adopt(self, i: int) -> None:
        """Moves the counts of a parameter into the vectors."""
        state = self._states[i]
        for name, views in self._views.items():
            if state[name] is not views[i]:
                views[i].fill_(state[name])
                state[name] = views[i]
        self.placed.add(i)
        self._seen = None

    def next(self, i: int) -> Count:
        """What `scalars` is given for a parameter in the coming step."""
        self._read()
        return self._equal[self._groups[i]] or self._each[i]

    def are_equal(self) -> tuple[bool, ...]:
        """Whether one count holds for all parameters of a group, per param group."""
        self._read()
        return self._are_equal

    def _read(self) -> None:
        version = sum([vector._version for vector in self._vectors.values()])
        if version == self._seen:
            return
        if self._vectors:
            step, *carried = (vector.tolist() for vector in self._vectors.values())
            self._each = list(zip([s + 1 for s in step], *carried, strict=True))
        else:
            self._each = [(1.0,) if i in self.fresh else (2.0,) for i in range(len(self._states))]
        found: list[set[Count]] = [set() for _ in range(max(self._groups, default=-1) + 1)]
        for i in self.placed:
            found[self._groups[i]].add(self._each[i])
        self._equal = [counts.pop() if len(counts) == 1 else None if counts else () for counts in found]
        self._are_equal = tuple(count is not None for count in self._equal)
        self._seen = version

    def advance(self, members: Sequence[int], carried: Sequence[Sequence[float]]) -> None:
        """Counts a step of these parameters; ``carried``: what `scalars` carries on for each."""
        everyone = len(members) == len(self._states)
        if self.fresh:
            self.fresh.difference_update(members)
            self._seen = None
        if not self._vectors:
            return
        index = slice(None) if everyone else torch.tensor(members, device="cpu")
        step, *others = self._vectors.values()
        if everyone:
            step.add_(1)
        else:
            step[index] += 1
        for vector, values in zip(others, zip(*carried, strict=True), strict=True):
            vector[index] = torch.tensor(values, dtype=vector.dtype, device="cpu")
        if everyone and not others and self._seen is not None and all(self._are_equal):
            self._equal = [tuple(c + 1 for c in count) for count in self._equal if count is not None]
            self._seen = step._version
