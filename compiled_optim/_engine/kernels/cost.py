"""What a step of a kernel costs, from the traced rule: bytes and operations as expressions in elements and tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from compiled_optim._engine.kernels.backends import backend_named
from compiled_optim._engine.kernels.trace import Signature, Traced, trace

# By the name of an aten operator, what it counts as. The others count under their own names.
_KINDS = {"sub": "add", "rsqrt": "sqrt", "reciprocal": "div", "convert_element_type": "convert", "_to_copy": "convert"}
# a store, which counts as bytes, a constant, and other names of the same bits
_FREE = {"copy_", "scalar_tensor", "alias", "view"}


@dataclass(frozen=True)
class Cost:
    """What one launch moves and computes.

    Attributes:
        read, written: bytes of one element by the name of its parameter, gradient or buffer.
        minimum: the bytes of one element that the declaration implies: the parameter and each kept buffer are read and
            written, the gradient is read, and written where it is `Signature.scaled`.
        per_tensor: the bytes that tell a launch about one tensor: addresses, sizes and scalars.
        operations: how many of each kind one element takes.
        tensor_operations: how many of each kind act on scalars alone, once for a tensor.
    """

    read: Mapping[str, int]
    written: Mapping[str, int]
    minimum: int
    per_tensor: int
    operations: Mapping[str, int]
    tensor_operations: Mapping[str, int]

    @property
    def bytes_per_element(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())

    @property
    def bytes(self) -> Any:
        """Bytes of a step as a sympy expression in the elements ``n`` and the tensors ``T``."""
        n, tensors, _ = _symbols()
        return n * self.bytes_per_element + tensors * self.per_tensor

    @property
    def arithmetic(self) -> Any:
        """Operations of a step as a sympy expression in ``n``, ``T`` and a symbol for each kind of operation."""
        n, tensors, _ = _symbols()
        return n * _sum(self.operations) + tensors * _sum(self.tensor_operations)

    @property
    def seconds(self) -> Any:
        """Of a step that memory bounds, as a sympy expression in ``n``, ``T`` and the bytes per second ``B``."""
        return self.bytes / _symbols()[2]

    def at(self, expression: Any, elements: int, tensors: int, bandwidth: float = 1.0) -> float:
        """The value of one of these expressions; each operation counts one.

        Args:
            bandwidth: in bytes per second.
        """
        values = dict(zip(_symbols(), (elements, tensors, bandwidth), strict=True))
        return float(expression.subs(values | {s: 1 for s in expression.free_symbols if s not in values}))


def of(signature: Signature) -> Cost:
    """The cost of a kernel.

    Raises:
        UntraceableError, BuildError: as `trace`.
    """
    return of_traced(trace(signature, backend_named(signature.backend).graph_device))


def of_traced(traced: Traced) -> Cost:
    signature = traced.signature
    widths = {name: dtype.itemsize for name, dtype in zip(signature.flat, signature.flat_dtypes, strict=True)}
    read, written = dict.fromkeys(widths, 0), dict.fromkeys(widths, 0)
    per_element: Counter[str] = Counter()
    per_tensor: Counter[str] = Counter()
    for node in traced.graph.graph.nodes:
        role = node.meta.get("role")
        if role in widths:
            stores = [user for user in node.users if _kind(user) == "copy_" and user.args[0] is node]
            written[role] = widths[role] * bool(stores)
            read[role] = widths[role] * (len(node.users) > len(stores))
        elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor) and _kind(node) not in _FREE:
            kind = _kind(node)
            counted = per_element if node.meta["val"].dim() else per_tensor
            counted[_KINDS.get(kind, kind)] += 1
    minimum = 2 * sum(widths.values()) - (0 if signature.scaled else widths["grad"])
    told = backend_named(signature.backend).bytes_per_tensor(signature)
    return Cost(read, written, minimum, told, dict(sorted(per_element.items())), dict(sorted(per_tensor.items())))


def _kind(node: Node) -> str:
    """The name of an aten operator without its overload."""
    return str(node.target).split(".")[1] if node.op == "call_function" else node.op


def _symbols() -> tuple[Any, Any, Any]:
    from sympy import Symbol  # type: ignore[import-untyped]

    n, tensors, bandwidth = (Symbol(name, positive=True) for name in ("n", "T", "B"))
    return n, tensors, bandwidth


def _sum(operations: Mapping[str, int]) -> Any:
    from sympy import Add, Symbol

    return Add(*(count * Symbol(kind, positive=True) for kind, count in operations.items()))
