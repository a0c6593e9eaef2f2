"""Triton source around Inductor's functions: what walks one over all tensors of a launch.

A launch has a row of 64-bit words for each tensor (`Words`, laid out in host/cuda.cpp). Inductor's functions are called
as they are: the launch has one block along the axis that they read, so they begin at the pointers they are handed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compiled_optim._engine.kernels.prologue import hypers_of
from compiled_optim._engine.kernels.trace import Signature
from compiled_optim._engine.torch_private.inductor import Lowered, LoweringError
from compiled_optim._engine.torch_private.triton import HEADER

UPDATE_ARGUMENTS = {"table": "*i64", "sizes": "*i64", "tensor_of": "*i32", "chunks": "i32", "repeat": "i32"}
PROLOGUE_ARGUMENTS = {"table": "*i64", "numbers": "*fp64", "tensors": "i32"}

# A chunk is `repeat` blocks of one tensor. Only a whole block of tensors that all begin on 16 bytes is loaded and
# stored 128 bits at a time.
_UPDATE = """

@triton.jit
def update(table, sizes, tensor_of, chunks, repeat, XBLOCK: tl.constexpr):
    chunk = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    if chunk < chunks:
        t = tl.load(tensor_of + chunk).to(tl.int64)
        row = table + t * {stride}
        skip = tl.load(tl.load(row + {skip}).to(tl.pointer_type(tl.float32)))
        if skip == 0:
            {addresses}
            k = tl.load(row + {factors}).to(tl.pointer_type({factor_type}))
            size = tl.load(sizes + 2 * t)
            begin = (chunk - tl.load(sizes + 2 * t + 1)) * repeat * XBLOCK
            for i in range(repeat):
                o = begin + i * XBLOCK
{block}
"""
_BLOCK = """\
                if (size - o >= XBLOCK) & (({any_address}) % 16 == 0):
                    kernel({aligned}, XBLOCK, XBLOCK)
                else:
                    kernel({unaligned}, tl.minimum(size - o, XBLOCK).to(tl.int32), XBLOCK)"""
# The gradient holds rows that lie elsewhere in the parameter and in the buffers: each element has a pointer of its own,
# less the index that Inductor's function adds.
_BLOCK_BY_ROWS = """\
                x = tl.arange(0, XBLOCK)
                at = o + x
                touched = tl.load(index + at // width, at < size, other=0)
                touched = tl.minimum(tl.maximum(touched, 0), rows - 1)
                there = touched * width + at % width - x
                kernel({unaligned}, tl.minimum(size - o, XBLOCK).to(tl.int32), XBLOCK)"""
# A lane per tensor. Inductor's function reads and writes float64 `numbers`, a row for each tensor; the counts and the
# hyperparameters come from wherever they lie, in float32 if the lowest bit of an address is set.
_PROLOGUE = """

@triton.jit
def number(address, mask):
    is_single = (address & 1) == 1
    double = tl.load(address.to(tl.pointer_type(tl.float64)), mask & ~is_single, other=0.0)
    single = tl.load((address & ~1).to(tl.pointer_type(tl.float32)), mask & is_single, other=0.0)
    return tl.where(is_single, single.to(tl.float64), double)


@triton.jit
def put(address, value, mask):
    is_single = (address & 1) == 1
    tl.store(address.to(tl.pointer_type(tl.float64)), value, mask & ~is_single)
    tl.store((address & ~1).to(tl.pointer_type(tl.float32)), value.to(tl.float32), mask & is_single)


@triton.jit
def prologue(table, numbers, tensors, XBLOCK: tl.constexpr):
    begin = tl.program_id(1) * XBLOCK
    x = tl.arange(0, XBLOCK)
    exists = begin + x < tensors
    t = tl.minimum(begin + x, tensors - 1).to(tl.int64)
    row = table + t * {stride}
    is_updated = exists & (tl.load(tl.load(row + {skip}).to(tl.pointer_type(tl.float32))) == 0)
    k = tl.load(row + {factors}).to(tl.pointer_type({factor_type})) - x
    hypers = tl.load(row + {hypers}).to(tl.pointer_type(tl.int64))
    n = numbers + t * {width} - x
    {gather}
    tl.debug_barrier()
    kernel({arguments}, tensors - begin, XBLOCK)
    tl.debug_barrier()
    {advance}
"""


@dataclass(frozen=True)
class Words:
    """Where the words of a tensor's row stand.

    The addresses of parameter, gradient and buffers come first. ``factors`` is the place of the address of its
    `Signature.factors`; ``skip`` that of a float32, which is zero unless the tensor is to be skipped. Of a kernel
    `by_rows`, ``index`` is that of the rows' numbers, which the elements of a row and the rows of the parameter follow.
    Of one `on_device`, ``counts`` is that of the addresses of its counts, and ``hypers`` that of a row of addresses of
    hyperparameters. Of another one that multiplies gradients, ``hypers`` is that of the address of its factor, in
    `Signature.scalar_dtype`, because the host may not know it. ``stride`` is the length.
    """

    factors: int
    skip: int
    index: int
    counts: int
    hypers: int
    stride: int

    @classmethod
    def of(cls, signature: Signature) -> Words:
        flat = len(signature.flat)
        index = flat + 2
        counts = index + (3 if signature.by_rows else 0)
        hypers = counts + (len(signature.rule.declaration.counts) if signature.on_device else 0)
        return cls(flat, flat + 1, index, counts, hypers, hypers + (signature.on_device or factor_of(signature) >= 0))

    @property
    def cells(self) -> int:
        """How many of them the host module has in its table: the addresses of tensors, and what a row's are."""
        return self.hypers - 2


def factor_of(signature: Signature) -> int:
    """Which of its scalars a kernel finds at an address of its own: the factor of the gradients, or -1 for none."""
    has_address = signature.rule.extras.factor and not signature.on_device
    return signature.scalars.index("grad_factor") if has_address else -1


def _facts(signature: Signature) -> dict[str, object]:
    return {**vars(Words.of(signature)), "factor_type": _type(signature.scalar_dtype)}


def _type(dtype: torch.dtype) -> str:
    return str(dtype).replace("torch", "tl")


def update_text(signature: Signature, lowered: Lowered) -> str:
    """The kernel ``update`` of `UPDATE_ARGUMENTS`, on a grid of (1, chunks, 1), or of more than that along z."""
    flat, dtypes, source = len(signature.flat), signature.flat_dtypes, lowered.source
    addresses = [f"a{i} = tl.load(row + {i}).to(tl.int64)" for i in range(flat)]
    if signature.by_rows:
        words = Words.of(signature)
        addresses.append(f"index = tl.load(row + {words.index}).to(tl.pointer_type(tl.int64))")
        addresses.append(f"width = tl.load(row + {words.index + 1})")
        addresses.append(f"rows = tl.load(row + {words.index + 2})")
    place = factor_of(signature)
    if place >= 0:
        pointers = f"tl.pointer_type({_type(signature.scalar_dtype)})"
        addresses.append(f"factor = tl.load(row + {Words.of(signature).hypers}).to({pointers})")

    first = flat + len(signature.factors) if signature.places else -1
    if first >= 0:
        source = _by_value(source, lowered.arguments.index(first))

    def pointer(i: int, aligned: bool) -> str:
        if i == first:
            return "o"
        if i >= flat:
            return "factor" if i - flat == place else f"k + {i - flat}"
        at = f"a{i}.to(tl.pointer_type({_type(dtypes[i])}))"
        if aligned:
            return f"tl.multiple_of({at}, 16) + o"
        return f"{at} + {'there' if signature.by_rows and i != 1 else 'o'}"

    places = [i for i in lowered.arguments if i is not None]
    block = (_BLOCK_BY_ROWS if signature.by_rows else _BLOCK).format(
        any_address=" | ".join(f"a{i}" for i in range(flat)),
        aligned=", ".join(pointer(i, True) for i in places),
        unaligned=", ".join(pointer(i, False) for i in places),
    )
    text = _UPDATE.format(**_facts(signature), addresses="\n            ".join(addresses), block=block)
    return f"{HEADER}\n\n{source}\n{text}"


def _by_value(source: str, place: int) -> str:
    """Inductor's function with a number at a place of its arguments where it expects the address of one."""
    name = source.partition("(")[2].split(", ")[place]
    load = f"tl.load({name} + (0))"
    if source.count(load) != 1:
        raise LoweringError(f"Inductor reads the place of an element otherwise than by {load}")
    return source.replace(load, name)


def prologue_text(signature: Signature, lowered: Lowered) -> str:
    """The kernel ``prologue`` of `PROLOGUE_ARGUMENTS`, on a grid of (1, blocks of tensors)."""
    counts, hypers = len(signature.rule.declaration.counts), len(hypers_of(signature))
    words, given = Words.of(signature), counts + hypers
    store = "tl.store(n + x + {}, number({}, is_updated), exists)"
    gather = [f"c{i} = tl.load(row + {words.counts + i})" for i in range(counts)]
    gather += [store.format(i, f"c{i}") for i in range(counts)]
    gather += [store.format(counts + i, f"tl.load(hypers + {i}, is_updated, other=0)") for i in range(hypers)]
    places = [i for i in lowered.arguments if i is not None]
    text = _PROLOGUE.format(
        **_facts(signature) | {"width": given},
        gather="\n    ".join(gather),
        arguments=", ".join(f"n + {i}" if i < given else f"k + {i - given}" for i in places),
        advance="\n    ".join(f"put(c{i}, tl.load(n + x + {i}), is_updated)" for i in range(counts)),
    )
    return f"{HEADER}\n\n{lowered.source}\n{text}"
