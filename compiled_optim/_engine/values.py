"""The values that a rule computes with: lists of tensors as one, and functions that numbers and tensors share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Value:
    """What a rule computes with: the operators of elementwise arithmetic, each of which calls `_apply` with its name.

    Operands are values of the same kind, Python numbers and tensors; a tensor stands on the right, or Python asks it
    first (``__torch_function__``).
    """

    __slots__ = ()

    def _apply(self, name: str, *operands: Any) -> Any:
        """``name``: of a method of a tensor, which this calls for each tensor of the value."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"an elementwise update cannot use .{name} of a value; "
            "if it needs whole tensors, declare `elementwise = False` in its class"
        )

    def __add__(self, other: Any) -> Any:
        return self._apply("add", other)

    def __sub__(self, other: Any) -> Any:
        return self._apply("sub", other)

    def __mul__(self, other: Any) -> Any:
        return self._apply("mul", other)

    def __truediv__(self, other: Any) -> Any:
        return self._apply("div", other)

    def __pow__(self, other: Any) -> Any:
        return self._apply("pow", other)

    def __neg__(self) -> Any:
        return self._apply("neg")

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __rtruediv__(self, other: Any) -> Any:
        return self._apply("reciprocal") * other

    def __gt__(self, other: Any) -> Any:
        return self._apply("gt", other)

    def __lt__(self, other: Any) -> Any:
        return self._apply("lt", other)

    def __eq__(self, other: Any) -> Any:
        return self._apply("eq", other)

    def __ne__(self, other: Any) -> Any:
        return self._apply("ne", other)

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TypeError("an update cannot branch on a value: use `where`, or a number that is declared as a switch")

    def maximum(self, other: Any) -> Any:
        return self._apply("maximum", other)

    def minimum(self, other: Any) -> Any:
        return self._apply("minimum", other)

    def clamp_min(self, least: float) -> Any:
        return self._apply("clamp_min", least)

    def addcmul(self, a: Any, b: Any, *, value: float) -> Any:
        return self._apply("addcmul", a, b, value)

    def lerp(self, end: Any, weight: float) -> Any:
        return self._apply("lerp", end, weight)

    def sqrt(self) -> Any:
        return self._apply("sqrt")

    def abs(self) -> Any:
        return self._apply("abs")

    def sign(self) -> Any:
        return self._apply("sign")

    def where(self, condition: Any, other: Any) -> Any:
        return self._apply("where", condition, other)

    def masked_fill(self, condition: Any, value: float) -> Any:
        return self._apply("masked_fill", condition, value)

    def rounded_at_random(self, noise: Any) -> Any:
        return self._apply("rounded_at_random", noise)


class TensorList(Value):
    """A list of tensors of one dtype and one device: each operator is one ``torch._foreach_*`` call."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def to(self, dtype: torch.dtype) -> TensorList:
        return self if dtype == self.dtype else TensorList([t.to(dtype) for t in self.tensors])

    def _apply(self, name: str, *operands: Any) -> TensorList:
        # the overloads for one 0-d tensor cannot be traced on fake tensors in torch 2.13
        lists = [
            o.tensors if isinstance(o, TensorList) else [o] * len(self.tensors) if isinstance(o, Tensor) else o
            for o in operands
        ]
        return TensorList(FUNCTIONS[name](self.tensors, *lists))

    def copy_(self, source: TensorList) -> None:
        torch._foreach_copy_(self.tensors, source.tensors)


def each(method: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """What has no foreach operation, one tensor at a time."""

    def call(tensors: Sequence[Tensor], *operands: Any) -> list[Tensor]:
        columns = [o if isinstance(o, list | tuple) else [o] * len(tensors) for o in operands]
        return [method(*row) for row in zip(tensors, *columns, strict=True)]

    return call


IN_FOREACH = ["add", "sub", "mul", "div", "pow", "neg", "reciprocal", "maximum", "minimum", "clamp_min"]
IN_FOREACH += ["addcmul", "lerp", "sqrt", "abs", "sign"]


def _round_at_random(x: Tensor, noise: Any, first: Any = 0) -> Tensor:
    """See `rounded_at_random`."""
    bits = x.view(torch.int32)
    place = torch.arange(x.numel(), dtype=torch.int32, device=x.device)
    if x.dim() != 1:
        place = place.as_strided(x.shape, x.stride())  # in memory, so that a launch has the same
    first, noise = (v.to(torch.int32) if isinstance(v, Tensor) else int(v) for v in (first, noise))
    # Wellons' hash "lowbias32" in int32, whose products wrap; its shifts keep the sign, which mixes as well
    mixed = ((place + first) * -0x61C88647 + noise) ^ (bits & -0x10000)
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * -0x7B935975
    random = (mixed ^ (mixed >> 16)) & 0xFFFF
    kept = ((bits + random) & -0x10000).view(torch.float32)
    return torch.where(x == x, kept, x)  # the sum of a NaN may be a number


_IN_TENSOR = ["gt", "lt", "eq", "ne", "where", "masked_fill"]
FUNCTIONS: dict[str, Callable[..., Any]] = {name: getattr(torch, f"_foreach_{name}") for name in IN_FOREACH}
FUNCTIONS |= {name: each(getattr(Tensor, name)) for name in _IN_TENSOR}
FUNCTIONS["rounded_at_random"] = each(_round_at_random)


def maximum(a: Any, b: Any) -> Any:
    """The greater of a number, a tensor or a value, and a number."""
    if isinstance(a, Value):
        return a.maximum(b)
    return a.clamp_min(b) if isinstance(a, Tensor) else max(a, b)


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the condition, a bool or tensors of bools, holds, else ``b``; both are evaluated."""
    if isinstance(condition, Value) or (isinstance(condition, Tensor) and isinstance(a, Value)):
        return a.where(condition, b)
    if not isinstance(condition, Tensor):
        return a if condition else b
    # of two Python floats torch.where makes a float32, also in a float64 model
    a, b = (v if isinstance(v, Tensor) else torch.full_like(condition, v, dtype=torch.float64) for v in (a, b))
    return torch.where(condition, a, b)


# ---- for rules with ``elementwise = False``


def mean(x: Any, dim: int | None = None) -> Any:
    """The mean of all elements of a tensor, 0-d; or over ``dim``, -1 or -2, which stays with the size 1."""
    if isinstance(x, Value):
        return x.mean(dim)
    return x.mean() if dim is None else x.mean(dim, keepdim=True)


def mean_square(x: Any, dim: int | None = None) -> Any:
    """The `mean` of the squares; that of all, in eager steps on the CPU, as a number."""
    if isinstance(x, Value):
        return (x * x).mean(dim)
    if dim is None:
        norm = torch.linalg.vector_norm(x)
        return (norm.item() if _is_eager(x) else norm) ** 2 / x.numel()
    if min(x.shape[-2:]) < 16:  # norms over short dimensions are slow
        return mean(x * x, dim)
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True).square() / x.shape[dim]


def divided(x: Any, divisor: Any, least: Any) -> Any:
    """``x / max(divisor, least)``. Eager steps on the CPU take the memory of the divisor, which nothing reads later."""
    if _is_eager(divisor):
        return torch.div(x, divisor.clamp_min_(least), out=divisor)
    return x / maximum(divisor, least)


def add_scaled(start: Any, x: Any, factor: Any) -> Any:
    """``start + x * factor``, the factor one number for a tensor. Takes the memory of ``x`` as `divided` does."""
    return torch.add(start, x, alpha=factor, out=x) if _is_eager(x) else start + x * factor


def _is_eager(x: Any) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu and not torch.compiler.is_compiling()


def batched(f: Callable[..., Tensor], x: Any, *numbers: Any, of_list: Callable[..., list[Tensor]] | None = None) -> Any:
    """What ``f(tensor, *numbers)`` makes of a tensor: one of the same shape. ``numbers`` must not depend on tensors.

    ``f`` may do what no loop over elements can, such as products of matrices. Compiled steps call
    ``of_list(tensors, *numbers)`` for many tensors at once, if it is given; it may overwrite them.
    """

    def each(tensors: list[Tensor], *numbers: Any) -> list[Tensor]:
        return [f(t, *numbers) for t in tensors]

    return x.batched(of_list or each, numbers) if isinstance(x, Value) else f(x, *numbers)


def of_shape(f: Callable[[torch.Size], float], x: Any) -> Any:
    """The number that ``f`` makes of the shape of a tensor."""
    return x.of_shape(f) if isinstance(x, Value) else f(x.shape)


def rounded_at_random(x: Any, noise: Any, first: Any) -> Any:
    """``x`` in float32, up or down to a value of bfloat16, which is ``x`` in the mean.

    The choice is up where the bits that are dropped and a hash carry: of the noise, the place of an element in its
    tensor, and the bits that are kept. The dropped ones are no part of it, so that a rounding error of float32 seldom
    makes another choice.

    Args:
        noise: an integer number below 2**24.
        first: the place of the first element.
    """
    return x.rounded_at_random(noise) if isinstance(x, Value) else _round_at_random(x, noise, first)


def lerp(start: Any, end: Any, weight: Any) -> Any:
    """``start + weight * (end - start)``, exact at weights of 0 and 1, for ``weight`` a number, or tensors of one."""
    if not isinstance(weight, Tensor | Value):
        return start.lerp(end, weight)
    # as torch.lerp, whose decomposition takes no symbolic length
    near = weight < 0.5
    return where(near, start, end) + (end - start) * where(near, weight, weight - 1)


def add_square(start: Any, x: Any, weight: Any) -> Any:
    """``start + weight * x * x``, which overflows where the product does and not where ``x * x`` would."""
    if isinstance(weight, Tensor | Value):
        return start + x * weight * x
    return start.addcmul(x, x, value=weight)
