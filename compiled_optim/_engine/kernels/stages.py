"""A rule that reduces, cut into stages of elementwise parts.

`mean` and `batched` need whole tensors: what they are given ends a stage, and what they return begins the next. Within
a stage each part is one loop over one space: over the elements of a tensor, or over its rows, its columns or its
matrices, whose values all elements of a row, a column or a matrix read. Parts over small spaces keep what others need.
Those over elements keep nothing that can be computed again, and only the last of them writes parameters and state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch

from compiled_optim._engine.kernels.trace import Signature
from compiled_optim._engine.record import Record, Symbol
from compiled_optim._engine.rule import apply
from compiled_optim._engine.torch_private.inductor import LoweringError

MOST_TILES, MOST_ARGUMENTS = 12, 64  # of a part, as in host/stages.h


class Space(IntEnum):
    """What there is one value of: the whole tensor, or each of its matrices, rows, columns or elements."""

    NUMBER = 0
    MATRIX = 1
    ROW = 2
    COLUMN = 3
    ELEMENT = 4


@dataclass(frozen=True)
class Part:
    """A loop over one space: the nodes that it reads and makes, and the inputs (or None) that become these."""

    stage: int
    space: Space
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    targets: tuple[int | None, ...]


@dataclass(frozen=True)
class Reduction:
    """``node`` is the mean of ``operand``."""

    node: int
    operand: int


@dataclass(frozen=True)
class Batch:
    """``node`` is what ``function`` makes of ``operand``, given these numbers or the scalars of these names."""

    node: int
    operand: int
    function: Callable[..., Any]
    numbers: tuple[str | float, ...]


class _Whole(Symbol):
    """A symbol of a whole tensor, which can be reduced."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"is not elementwise and uses .{name} of a value, besides `mean`, `batched` and `of_shape`"
        )

    def mean(self, dim: int | None) -> Symbol:
        name = "mean" if dim is None else f"mean{dim}"
        return self._record.add(name, self.dtype, self)

    def batched(self, function: Callable[..., Any], numbers: Iterable[Any]) -> Symbol:
        made = self._record.add("batched", self.dtype, self)
        self._record.called[made.index] = (function, tuple(numbers))  # type: ignore[attr-defined]
        return made

    def of_shape(self, function: Callable[..., float]) -> Symbol:
        made = self._record.add("of_shape", self._record.width)
        self._record.called[made.index] = (function, ())  # type: ignore[attr-defined]
        return made


class _Record(Record):
    symbol = _Whole

    def __init__(self, dtypes: Any, width: torch.dtype) -> None:
        super().__init__(dtypes, width)
        self.called: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}


# From the space of an operand to that of its mean.
_MEANS = {
    "mean": dict.fromkeys(Space, Space.NUMBER),
    "mean-1": {Space.ELEMENT: Space.ROW, Space.COLUMN: Space.MATRIX},
    "mean-2": {Space.ELEMENT: Space.COLUMN, Space.ROW: Space.MATRIX},
}
_LEAVES = ("input", "mean", "mean-1", "mean-2", "batched", "of_shape")


@dataclass
class Stages:
    """The stages of the rule of one signature.

    Attributes:
        nodes: the name, the dtype and the operands of each; inputs come first: tensors, then scalars.
        constants: the values of the "number" nodes.
        spaces, stages: of each node.
        shapes: of the "of_shape" nodes, their functions.
        outputs: by input, the node that it becomes.
    """

    signature: Signature
    nodes: list[tuple[Any, ...]]
    constants: dict[int, Any]
    spaces: list[Space]
    stages: list[int]
    shapes: dict[int, Callable[..., float]]
    outputs: dict[int, int]
    parts: list[Part] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)

    @functools.cached_property
    def of_matrices(self) -> bool:
        """Whether rows and columns are told apart."""
        return any(space in (Space.MATRIX, Space.ROW, Space.COLUMN) for space in self.spaces)

    def arguments(self, part: Part) -> tuple[list[int], list[int], list[int]]:
        """What it writes to memory that is no input, and what it reads: first arrays, then numbers.

        To a part over numbers these are arrays of one element: of others, Inductor of torch 2.11 makes several loops.
        """
        pairs = zip(part.makes, part.targets, strict=True)
        made = [node for node, target in pairs if target is None or part.space != Space.ELEMENT]
        numbers = [node for node in part.reads if self.spaces[node] == Space.NUMBER != part.space]
        return made, [node for node in part.reads if node not in numbers], numbers


def cut(signature: Signature) -> Stages:
    """Records the rule, and cuts it.

    Raises:
        LoweringError: if the rule does what cannot be cut.
    """
    found = _recorded(signature)
    last = max(found.stages[node] for node in found.outputs.values())
    reduced = [i for i, (name, *_) in enumerate(found.nodes) if name in _MEANS or name == "batched"]
    wanted: dict[tuple[int, Space], dict[int, int | None]] = {}

    def ask(node: int, target: int | None = None) -> None:
        """Makes a part make this node."""
        space = found.spaces[node]
        stage = last if space == Space.ELEMENT and target is not None else found.stages[node]
        made = wanted.setdefault((stage, space), {})
        if made.get(node) is None:
            made[node] = target

    for i in reduced:
        ask(found.nodes[i][2])
    for target, node in found.outputs.items():
        ask(node, target)
    # what the parts read may have to be made by others, whose stages come earlier or whose spaces are smaller
    for stage in range(last, -1, -1):
        for space in reversed(Space):
            made = wanted.get((stage, space), {})
            for leaf in _leaves(found, made, (stage, space)):
                if found.nodes[leaf][0] not in _LEAVES:
                    ask(leaf)
    for (stage, space), made in sorted(wanted.items()):
        # a mean over a small space is kept where it is made
        makes = {n: target for n, target in made.items() if space == Space.ELEMENT or found.nodes[n][0] not in _LEAVES}
        if makes:
            reads = dict.fromkeys(_leaves(found, makes, (stage, space)))
            if space == Space.ELEMENT:
                reads |= dict.fromkeys(t for t in makes.values() if t is not None)
            part = Part(stage, space, tuple(reads), tuple(makes), tuple(makes.values()))
            written, arrays, numbers = found.arguments(part)
            tiles = len(written) + sum(found.spaces[node] != space for node in arrays)
            if tiles > MOST_TILES or len([*written, *arrays, *numbers]) > MOST_ARGUMENTS:
                raise LoweringError(f"the update of {signature.name} needs too many values at once")
            found.parts.append(part)
    return found


def _recorded(signature: Signature) -> Stages:
    declaration, flat = signature.rule.declaration, len(signature.flat)
    width = signature.scalar_dtype
    record = _Record([*signature.flat_dtypes, *[width] * len(signature.scalars)], width)
    p, g, *rest = record.inputs
    state = dict(zip(signature.buffers, rest, strict=False))
    scalars = dict(zip(signature.scalars, record.inputs[flat:], strict=True))
    try:
        new, made = apply(signature.rule, signature.switches, p, g, state, scalars)
    except (AttributeError, TypeError) as error:
        raise LoweringError(f"{signature.rule.name} is not one fusible loop and no stages of loops: {error}") from error
    outputs = {0: new.index, **{2 + i: made[name].index for i, name in enumerate(signature.buffers)}}
    nodes = [*[("input", s.dtype) for s in record.inputs], *record.entries]
    values = iter(record.constants)
    constants = {i: next(values) for i, (name, *_) in enumerate(nodes) if name == "number"}
    for value in constants.values():
        if not isinstance(value, int | float):
            raise LoweringError(f"the update of {signature.name} takes a {type(value).__name__} from outside")
    spaces: list[Space] = []
    stages: list[int] = []
    for i, (name, _, *operands) in enumerate(nodes):
        its = [spaces[o] for o in operands]
        stage = max([stages[o] for o in operands], default=0)
        if name == "input":
            space = _space_of(declaration.means.get(signature.flat[i])) if i < flat else Space.NUMBER
        elif name in _MEANS:
            if its[0] not in _MEANS[name]:
                raise LoweringError(f"the update of {signature.name} has a mean of what is no longer a matrix")
            space, stage = _MEANS[name][its[0]], stage + 1
        elif name == "batched":
            if its[0] != Space.ELEMENT:
                raise LoweringError(f"the update of {signature.name} makes a batch of what is no whole tensor")
            space, stage = Space.ELEMENT, stage + 1
        else:
            space = _joined(its)
        spaces.append(space)
        stages.append(stage)
    last_batch = max((stages[i] for i, (name, *_) in enumerate(nodes) if name == "batched"), default=0)
    if any(
        name in _MEANS and spaces[i] != Space.NUMBER and stages[i] <= last_batch for i, (name, *_) in enumerate(nodes)
    ):
        raise LoweringError(f"the update of {signature.name} takes means over rows or columns before a batch")
    if spaces[new.index] != Space.ELEMENT or any(spaces[n] != spaces[i] for i, n in outputs.items()):
        raise LoweringError(f"the update of {signature.name} returns what has another shape")
    found = Stages(signature, nodes, constants, spaces, stages, {}, {i: n for i, n in outputs.items() if i != n})
    for i, (name, _, *operands) in enumerate(nodes):
        if name in _MEANS:
            found.reductions.append(Reduction(i, operands[0]))
        elif name == "batched":
            function, numbers = record.called[i]
            found.batches.append(Batch(i, operands[0], function, _by_name(signature, numbers)))
        elif name == "of_shape":
            found.shapes[i] = record.called[i][0]
    return found


def _by_name(signature: Signature, numbers: tuple[Any, ...]) -> tuple[str | float, ...]:
    """Of what a batch is given: the names of scalars, and numbers."""
    first, found = len(signature.flat), []
    for number in numbers:
        if not isinstance(number, _Whole):
            found.append(number)
        elif 0 <= number.index - first < len(signature.scalars):
            found.append(signature.scalars[number.index - first])
        else:
            raise LoweringError(f"the update of {signature.name} gives a batch what the host does not know")
    return tuple(found)


def _space_of(mean_over: int | None) -> Space:
    return {None: Space.ELEMENT, -1: Space.ROW, -2: Space.COLUMN}[mean_over]


def _joined(spaces: list[Space]) -> Space:
    """The smallest space that all broadcast to."""
    if Space.ROW in spaces and Space.COLUMN in spaces:
        return Space.ELEMENT
    return max(spaces, default=Space.NUMBER)


def _leaves(found: Stages, makes: Iterable[int], at: tuple[int, Space]) -> list[int]:
    """What a part there reads to make these: leaves, and what is made elsewhere, each once."""
    leaves: dict[int, None] = {}
    seen: set[int] = set()
    pending = list(makes)
    for node in pending:
        name, _, *operands = found.nodes[node]
        here = found.spaces[node] == at[1] and (at[1] == Space.ELEMENT or found.stages[node] == at[0])
        if name in _LEAVES or (name != "number" and not here):
            leaves[node] = None
            continue
        for operand in operands:
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return list(leaves)
