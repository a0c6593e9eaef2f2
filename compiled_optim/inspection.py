"""What runs for an optimizer class, its options and its dtypes on a target: worked out on any machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from compiled_optim._engine.kernels import cost
from compiled_optim._engine.kernels.backends import Backend, backend_named
from compiled_optim._engine.kernels.backends.cuda import Cuda
from compiled_optim._engine.kernels.prologue import constants_of
from compiled_optim._engine.kernels.trace import Signature, Traced, trace
from compiled_optim._engine.one_pass import ARGUMENTS, OnePass
from compiled_optim._engine.rule import first_scalars
from compiled_optim._engine.torch_private import triton
from compiled_optim._engine.torch_private.inductor import Lowered
from compiled_optim._engine.torch_private.triton import Program
from compiled_optim.declare import Flag, Number
from compiled_optim.optimizer import Optimizer


def switches_of(cls: type[Optimizer]) -> dict[str, Flag | Number]:
    """The arguments of a class that select a kernel."""
    return {k: v for k, v in cls.rule.declaration.options.items() if v.switch and v.init}


def signature_of(
    cls: type[Optimizer],
    options: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    target: str = "cpu",
    on_device: bool = False,
) -> Signature:
    """The kernel that these options select.

    Args:
        cls: a class with a rule; options: arguments of its constructor.
        dtype: of parameters and gradients; state_dtype: of the moments, if not what the options say.
        target: the name of a backend, such as "cpu" or "sm_90".
        on_device: whether steps are counted on the device, as with ``capturable=True``.

    Raises:
        ValueError: for options that are out of range or do not go together, and for what the target has no kernel of.
    """
    if not cls.elementwise:
        raise ValueError(f"{cls.__name__} is not elementwise, so its step is not one kernel")
    rule = cls.rule.extended(OnePass(**{k: v for k, v in options.items() if k in ARGUMENTS}).extras)
    declaration, backend = rule.declaration, backend_named(target)
    hyper, switches, _ = declaration.read(declaration.check({**options}))
    cls.validate(hyper)
    for given in (dtype, state_dtype or dtype):
        if given not in backend.dtypes:
            raise ValueError(f"{target} has no kernel for {str(given).removeprefix('torch.')}")
    if on_device and not backend.asynchronous:
        raise ValueError(f"{target} has no kernel that counts steps on the device: there the host counts")
    buffers, scalars = declaration.kept(switches, dtype), tuple(first_scalars(rule, hyper))
    moments = declaration.buffers.keys() - declaration.copies.keys()
    of_state = [(state_dtype if name in moments else None) or declaration.dtype_of(name, dtype) for name in buffers]
    signature = Signature(rule, switches, (dtype, *of_state), buffers, scalars, backend=target)
    return replace(signature, on_device=True, constants=constants_of(signature, hyper)) if on_device else signature


@dataclass(frozen=True)
class Inspection:
    """A kernel from its graph to its machine code. Each part is made when it is asked for.

    ``portable``: whether the source is to be the same on every machine.

    Raises:
        LoweringError, UntraceableError, BuildError: whatever is asked for, if the rule does not get that far.
    """

    signature: Signature
    portable: bool = False

    @cached_property
    def backend(self) -> Backend:
        return backend_named(self.signature.backend)

    @cached_property
    def traced(self) -> Traced:
        return trace(self.signature, self.backend.graph_device)

    @cached_property
    def lowered(self) -> Lowered:
        return self.backend.lower(self.traced, portable=self.portable)

    @cached_property
    def cost(self) -> cost.Cost:
        return cost.of_traced(self.traced)

    @property
    def graph(self) -> str:
        """The FX graph, a line for each node."""
        return "\n".join(_graph_lines(self.traced))

    @property
    def sources(self) -> list[str]:
        """What is compiled: the update over all tensors, and the prologue if there is one."""
        update = self.backend.full_source(self.signature, self.lowered)
        if isinstance(self.backend, Cuda) and self.signature.on_device:
            return [update, self.backend.prologue(self.signature)]
        return [update]

    @cached_property
    def programs(self) -> list[Program]:
        """The machine code of a GPU's `sources`; none for a CPU."""
        return self.backend.programs(self.signature, self.lowered) if isinstance(self.backend, Cuda) else []

    @property
    def resources(self) -> list[tuple[int, int, int]]:
        """Of each program the registers of a thread, the bytes it spills, and the bits of its widest loads."""
        return [(*triton.usage(program), triton.load_bits(program)[0]) for program in self.programs]


def summary(found: Inspection, bandwidth: float) -> Iterator[str]:
    """What runs, how often, what it moves, and what a GPU needs for it; ``bandwidth``: in GB/s."""
    yield found.signature.name
    yield from describe(found.cost, bandwidth, launches=len(found.sources))
    for program, (registers, spilled, bits) in zip(found.programs, found.resources, strict=True):
        yield f"{program.name}: {registers} registers a thread, {spilled} bytes spilled, loads of up to {bits} bits"


def describe(found: cost.Cost, bandwidth: float = 1000, launches: int = 1) -> Iterator[str]:
    """What a step moves and computes, in words and as formulas; ``bandwidth``: in GB/s."""
    yield f"launches of a step: {launches}, temporaries: 0"
    yield f"bytes of an element: {found.bytes_per_element}, at least {found.minimum} by the declaration"
    for name in found.read:
        yield f"    {name}: {found.read[name]} read, {found.written[name]} written"
    counts = ", ".join(f"{count} {kind}" for kind, count in found.operations.items())
    yield f"operations on an element: {sum(found.operations.values())} ({counts})"
    yield "a step of n elements in T tensors, at B bytes a second:"
    yield f"    bytes = {found.bytes}"
    yield f"    operations = {found.arithmetic}"
    yield f"    seconds = {found.seconds}"
    milliseconds = 1e3 * found.at(found.seconds, 10**9, 0, bandwidth * 1e9)
    yield f"    milliseconds for a billion elements at {bandwidth:g} GB/s = {milliseconds:g}"


def _graph_lines(traced: Traced) -> Iterator[str]:
    def text(argument: Any) -> str:
        return str(roles.get(argument, argument))

    roles = {n: n.meta["role"] for n in traced.graph.graph.nodes if "role" in n.meta}
    for node in traced.graph.graph.nodes:
        if node.op == "placeholder":
            kind = "0-d" if node.meta["val"].dim() == 0 else "flat"
            yield f"{roles[node]}: {kind} {node.meta['val'].dtype}"
        elif node.op == "call_function":
            yield f"{node.name} = {node.target}({', '.join(text(a) for a in node.args)})"
