"""The native code of a rule in stages: Inductor's loops, and host/stages.h, which walks tensors with them.

What one part hands to the next stays in cache where it can: small tensors go through all stages one by one, by one
thread each, and of large ones a few thousand elements at a time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.cache.store import Fact
from compiled_optim._engine.kernels.stages import Part, Reduction, Space, Stages, cut
from compiled_optim._engine.kernels.trace import Signature, write
from compiled_optim._engine.torch_private import inductor

_HEADER = Path(__file__).parent / "host" / "stages.h"
_C_TYPES = {torch.float32: "float", torch.float64: "double"}
SHAPE = 3  # the first columns of a table: how many matrices, rows and columns


@dataclass(frozen=True)
class Layout:
    """Where the values of a signature stand.

    Attributes:
        slots: of each NUMBER, its place among the numbers of a tensor: scalars first, then what shapes say.
        arrays: of each value of a row, a column or a matrix that is kept, its place among them.
        homes: of those that become state, the input whose memory they are computed in.
        columns: how many a table has: the shape, an address of each input, and two of each batch.
    """

    slots: dict[int, int]
    arrays: dict[int, int]
    homes: dict[int, int]
    columns: int


@functools.lru_cache(maxsize=256)
def stages_of(signature: Signature) -> tuple[Stages, Layout]:
    """The stages of a rule, and where its values stand."""
    found = cut(signature)
    flat = len(signature.flat)
    kept = [node for part in found.parts if part.space != Space.ELEMENT for node in part.makes]
    kept += [r.node for r in found.reductions]
    numbers = [n for n in dict.fromkeys(kept) if found.spaces[n] == Space.NUMBER]
    scalars = range(flat, flat + len(signature.scalars))
    slots = {node: i for i, node in enumerate([*scalars, *found.shapes, *numbers])}
    arrays = {n: i for i, n in enumerate(dict.fromkeys(k for k in kept if found.spaces[k] != Space.NUMBER))}
    homes = {
        node: target for target, node in found.outputs.items() if node in arrays and _may_live_in(found, node, target)
    }
    return found, Layout(slots, arrays, homes, SHAPE + flat + 2 * len(found.batches))


def _may_live_in(found: Stages, node: int, target: int) -> bool:
    """Whether nothing reads an input after the part that makes this node of it."""
    (made,) = [(p.stage, p.space) for p in found.parts if node in p.makes] or [(-1, Space.NUMBER)]
    return all((p.stage, p.space) <= made for p in found.parts if target in p.reads)


def program(signature: Signature) -> tuple[str, Sequence[str], dict[str, Fact]]:
    """The source, the flags of its compiler, and what is recorded of it."""
    found, layout = stages_of(signature)
    loops = [_loop(found, part, i) for i, part in enumerate(found.parts)]
    sizes = dict(enumerate(dtype.itemsize for dtype in signature.flat_dtypes))
    over_elements = [part for part in found.parts if part.space == Space.ELEMENT]
    moved = sum(sizes.get(i, 0) for part in over_elements for i in (*part.reads, *part.targets) if i is not None)
    text = "\n".join(
        [
            f"// {signature.name}",
            f'#include "{_HEADER.name}"',
            "#include <torch/csrc/inductor/cpp_prefix.h>",
            "static thread_local std::atomic<int>* division_flag;",
            "#define inductor_cpu_integer_div_error_flag division_flag",
            *(text for text, _ in loops),
            "#undef inductor_cpu_integer_div_error_flag",
            "namespace stages {",
            "struct Any { void* at; template <class T> operator T*() const { return static_cast<T*>(at); } };",
            *_tables(found, layout, [arguments for _, arguments in loops]),
        ]
    )
    flags = [*inductor.cpp_flags(), f"-I{_HEADER.parent}"]
    return text, flags, {"name": signature.name, "bytes_per_element": moved}


def identity() -> str:
    """Of what decides the text beside the rule."""
    files = (Path(__file__), Path(__file__).with_name("stages.py"), _HEADER)
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def load(path: Path, signature: Signature) -> tuple[int, object]:
    """The entry of a shared library.

    Raises:
        OSError: if it is none. ImportError: if it takes other arguments.
    """
    library = ctypes.CDLL(str(path))
    _, layout = stages_of(signature)
    if getattr(library, "made_for", lambda: None)() != _made_for(layout):
        raise ImportError(f"it takes other arguments than {signature.name}")
    address = ctypes.cast(library.run, ctypes.c_void_p).value
    assert address is not None
    return address, library


def _made_for(layout: Layout) -> int:
    return layout.columns * 1000 + len(layout.slots)


# ---- Inductor's loops


def _loop(found: Stages, part: Part, i: int) -> tuple[str, tuple[int | None, ...]]:
    """The source of a loop as ``kernel_i``, and which of the part's arguments each of its is (None: the length)."""
    made, flat, numbers = found.arguments(part)
    reads = [*flat, *numbers]

    def body(*values: Tensor) -> list[Any]:
        known: dict[int, Any] = dict(zip(reads, values[len(made) :], strict=True))
        return [_value(found, node, known) for node in part.makes]

    dtypes, of_numbers = ([found.nodes[n][1] for n in nodes] for nodes in ([*made, *flat], numbers))
    graph, mode, inputs = inductor.trace_flat(body, dtypes, of_numbers, "cpu")
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    own = dict(zip(made, placeholders, strict=False))
    inputs_at = dict(zip(reads, placeholders[len(made) :], strict=True))
    targets = zip(part.makes, part.targets, strict=True)
    write(graph, [own[node] if node in own else inputs_at[target or 0] for node, target in targets])
    name = f"{found.signature.name}, stage {part.stage}, {part.space.name.lower()}"
    lowered = inductor.lower_cpp(inductor.FlatGraph(name, graph, mode, inputs))
    return f"#define kernel kernel_{i}\n{lowered.source}\n#undef kernel", lowered.arguments


def _value(found: Stages, node: int, known: dict[int, Any]) -> Any:
    if node not in known:
        name, dtype, *operands = found.nodes[node]
        known[node] = (
            found.constants[node]
            if name == "number"
            else _applied(name, dtype, [_value(found, o, known) for o in operands])
        )
    return known[node]


def _applied(name: str, dtype: torch.dtype, operands: list[Any]) -> Any:
    first, *others = operands
    if name == "to":
        return first.to(dtype)
    if name in ("maximum", "minimum") and not isinstance(others[0], Tensor):
        return first.clamp(**{"min" if name == "maximum" else "max": others[0]})
    if name == "addcmul":
        a, b, factor = others
        return first + a * b * factor
    return getattr(torch.Tensor, name)(first, *others)


# ---- what host/stages.h has to know


def _tables(found: Stages, layout: Layout, arguments: list[tuple[int | None, ...]]) -> list[str]:
    """The tables of host/stages.h, and the entry."""
    lines, parts, means = [], [], []
    for i, part in enumerate(found.parts):
        made, *read = found.arguments(part)
        given = [*made, *read[0], *read[1]]
        places = [_place(found, layout, n, own=j < len(made)) for j, n in enumerate(given)]
        lines.append(_table("Argument", f"ARGUMENTS_{i}", places))
        call = ", ".join("n" if a is None else f"Any{{a[{a}]}}" for a in arguments[i])
        lines.append(f"static void run_{i}(void* const* a, int64_t n) {{ kernel_{i}({call}); }}")
        parts.append((part.stage, int(part.space), len(given), f"ARGUMENTS_{i}", f"run_{i}"))
        if part.space == Space.ELEMENT:
            at = {node: j for j, node in enumerate(made)}
            means += [_mean(found, layout, r, part.stage, at[r.operand]) for r in found.reductions if r.operand in at]
    for r in found.reductions:
        if found.spaces[r.operand] != Space.ELEMENT:
            means.append(_mean(found, layout, r, found.stages[r.operand], layout.arrays[r.operand]))
    becomes = {node: SHAPE + target for target, node in found.outputs.items()}
    homes = {node: SHAPE + target for node, target in layout.homes.items()}
    arrays = [
        (int(found.spaces[n]), found.nodes[n][1].itemsize, homes.get(n, -1), -1 if n in homes else becomes.get(n, -1))
        for n in layout.arrays
    ]
    lines += [_table("Part", "PARTS", parts), _table("Mean", "MEANS", means), _table("Array", "ARRAYS", arrays)]
    given_numbers = len(found.signature.scalars) + len(found.shapes)
    sizes = ", ".join(map(str, (layout.columns, given_numbers, len(layout.slots))))
    tables = f"{{PARTS, {len(parts)}}}, {{MEANS, {len(means)}}}, {{ARRAYS, {len(arrays)}}}"
    width = _C_TYPES[found.signature.scalar_dtype]
    return [
        *lines,
        f"static const Program PROGRAM = {{{sizes}, {tables}}};",
        "}",
        'extern "C" void run(int64_t tensors, const int64_t* table, double* slots, int first, int last, int threads) {',
        f"  stages::run<{width}>(stages::PROGRAM, tensors, table, slots, first, last, threads);",
        "}",
        f'extern "C" int64_t made_for() {{ return {_made_for(layout)}; }}',
    ]


def _table(kind: str, name: str, rows: Sequence[tuple[Any, ...]]) -> str:
    text = ", ".join(f"{{{', '.join(map(str, row))}}}" for row in rows)
    return f"static const {kind} {name}[] = {{{text or '{}'}}};"


def _place(found: Stages, layout: Layout, node: int, own: bool) -> tuple[str, int, int, int]:
    """Where a part finds a value, or puts its ``own``, as an ``Argument``."""
    space, size = int(found.spaces[node]), found.nodes[node][1].itemsize
    if node in layout.slots:
        return "SLOT", layout.slots[node], space, size
    if node in layout.arrays:
        return "ARRAY", layout.arrays[node], space, size
    for batch, column in zip(found.batches, count(SHAPE + len(found.signature.flat), 2), strict=False):
        if node == batch.node or (own and node == batch.operand):
            return "INPUT", column + (node == batch.node), space, size
    return ("TILE", 0, space, size) if own else ("INPUT", SHAPE + node, space, size)


def _mean(found: Stages, layout: Layout, r: Reduction, stage: int, operand: int) -> tuple[int, ...]:
    space = found.spaces[r.node]
    at = layout.slots[r.node] if space == Space.NUMBER else layout.arrays[r.node]
    return stage, operand, int(found.spaces[r.operand]), int(space), at
