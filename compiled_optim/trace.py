"""A rule as an FX graph over ONE flat tensor of symbolic length, so that one kernel serves every model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compiled_optim import lower
from compiled_optim.rule import apply, arithmetic_dtype

if TYPE_CHECKING:
    from compiled_optim.optimizer import Optimizer


@dataclass(frozen=True)
class Signature:
    """What decides a kernel: never a value of a hyperparameter, never a shape.

    ``buffers`` and ``scalars`` are names in the order the kernel takes them; ``dtypes`` are real, of the parameter (and
    its gradient) and of each buffer.
    """

    algorithm: type[Optimizer]
    switches: Any
    dtypes: tuple[torch.dtype, ...]
    buffers: tuple[str, ...]
    scalars: tuple[str, ...]

    @property
    def flat(self) -> tuple[str, ...]:
        return ("param", "grad", *self.buffers)

    @property
    def flat_dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.dtypes[0], *self.dtypes)

    @property
    def scalar_dtype(self) -> torch.dtype:
        return arithmetic_dtype(self.dtypes[0])

    @property
    def name(self) -> str:
        """Readable and unique within a process: ``AdamW(decoupled_weight_decay)[float32]``."""
        on = ", ".join(k for k, v in self.switches._asdict().items() if v)
        dtypes = dict.fromkeys(str(d).removeprefix("torch.") for d in self.dtypes)
        return f"{self.algorithm.__name__}({on})[{', '.join(dtypes)}]"


@dataclass(frozen=True)
class Traced:
    signature: Signature
    graph: torch.fx.GraphModule
    fake_mode: Any
    inputs: list[Any]


def trace(signature: Signature, device: str = "cpu") -> Traced:
    """Traces the rule on fake tensors; the results are copied into the inputs, as the last nodes of the graph."""
    names = signature.flat + signature.scalars
    flat = len(signature.flat)

    def body(*values: Any) -> list[Any]:
        p, g, *buffers = values[:flat]
        state = dict(zip(signature.buffers, buffers, strict=True))
        scalars = dict(zip(signature.scalars, values[flat:], strict=True))
        new, new_state = apply(signature.algorithm, signature.switches, p, g, state, scalars)
        return [new, *(new_state[name] for name in signature.buffers)]

    scalar_dtypes = [signature.scalar_dtype] * len(signature.scalars)
    graph, mode, inputs = lower.trace_flat(body, list(signature.flat_dtypes), scalar_dtypes, device)
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node.meta["role"] = name
    output = next(n for n in graph.graph.nodes if n.op == "output")
    written = [placeholders[0], *placeholders[2:flat]]
    with graph.graph.inserting_before(output):
        for target, value in zip(written, output.args[0], strict=True):
            node = graph.graph.call_function(torch.ops.aten.copy_.default, (target, value))
            node.meta["val"] = target.meta["val"]
    output.args = ([],)
    graph.recompile()
    return Traced(signature, graph, mode, inputs)
