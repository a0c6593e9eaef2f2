"""Test cases derived from the declarations: a new optimizer is tested by existing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import compiled_optim
from compiled_optim import algorithms
from compiled_optim.declare import Flag, Number

CLASSES = [getattr(algorithms, name) for name in algorithms.__all__ if hasattr(torch.optim, name)]
ELEMENTWISE = [cls for cls in CLASSES if cls.elementwise]  # whose step is one kernel
_NO_RULE = {"foreach", "differentiable", "fused", "capturable"}  # flags that select an execution, not a formula

# Where a number has an effect within a few steps, if its declared bounds do not say.
_RANGES = {
    "alpha": [(0.5, 0.99)],  # a smaller one leaves centered RMSprop next to nothing but rounding under the root
    "lambd": [(0.01, 0.5)],
    "t0": [(0.0, 4.0)],
    "etas": [(0.3, 0.6), (1.2, 2.0)],
    "step_sizes": [(0.01, 0.03), (0.06, 0.1)],
    "beta2_decay": [(-0.9, -0.3)],
    "d": [(1.0, 1.2)],  # the RMS that it bounds begins at 1
    "ns_coefficients": [(3.0, 3.5), (-5.0, -4.5), (1.8, 2.1)],
    "ns_steps": [(1, 4)],
}


def oracle(cls: type[compiled_optim.Optimizer]) -> Any:
    """The class of torch.optim that `cls` stands in for."""
    return getattr(torch.optim, cls.__name__)


def tolerance(cls: type[compiled_optim.Optimizer]) -> float:
    """The relative error allowed in float64.

    torch.optim keeps what `scalars` carries (NAdam's product of momenta, ASGD's eta and mu) in tensors of the default
    dtype and takes the value of a step from there. Under the usual float32 its float64 updates are exact to float32's
    rounding only; ours, rounded in other places, cannot agree with them any better.
    """
    return 1e-6 if cls.rule.declaration.carried and torch.get_default_dtype() == torch.float32 else 1e-12


def _kind_of_state(cls: type[compiled_optim.Optimizer]) -> tuple[bool, ...]:
    """What decides how the state of a class is made, checked and loaded, whatever its formula is."""
    declared = cls.rule.declaration
    held = (bool(names) for names in (declared.counts, declared.carried, declared.means))
    return *held, cls.accepts_dense, cls.accepts_sparse, cls.state_at_construction, cls.elementwise


def _one_of_each_kind() -> list[type[compiled_optim.Optimizer]]:
    kinds: dict[tuple[bool, ...], type[compiled_optim.Optimizer]] = {}
    for cls in sorted(CLASSES, key=lambda cls: -len(cls.rule.declaration.slots)):  # those with most state come first
        kinds.setdefault(_kind_of_state(cls), cls)
    return list(kinds.values())


KINDS = _one_of_each_kind()  # for what depends on the kind of state and not on the formula


# ---- parameters and gradients


def fits(cls: type[torch.optim.Optimizer], tensor: Tensor) -> bool:
    """Whether the class, ours or torch's, takes parameters of this shape."""
    return tensor.dim() == 2 or not getattr(compiled_optim, cls.__name__, cls).matrices_only


def fitted(cls: type[torch.optim.Optimizer], tensor: Tensor) -> Tensor:
    """A tensor of the same elements, in a shape that parameters of the class may have."""
    if fits(cls, tensor):
        return tensor
    return tensor.reshape(tensor.shape[:-1].numel(), *(tensor.shape[-1:] or [1]))


def taken(cls: type[torch.optim.Optimizer], dense: Tensor) -> Tensor:
    """A gradient as the class, ours or torch's, takes it: sparse where it takes no dense ones."""
    accepts_dense = getattr(algorithms, cls.__name__, cls).accepts_dense
    return dense if accepts_dense or dense.is_sparse else dense.to_sparse(min(dense.dim(), 1))


def gradient(cls: type[torch.optim.Optimizer], p: Tensor) -> Tensor:
    """A random gradient that the class takes; a sparse one lacks some rows and has others twice."""
    g = taken(cls, torch.randn_like(p))
    if not g.is_sparse or p.dim() == 0 or len(p) == 0:
        return g
    rows = torch.randint(len(p), (1 + len(p) // 2,), device=p.device).repeat(2)
    values = torch.randn(len(rows), *p.shape[1:], dtype=p.dtype, device=p.device)
    return torch.sparse_coo_tensor(rows[None], values, p.shape, check_invariants=True)


# ---- options


def ranges(name: str, field: Number) -> list[tuple[float, float]]:
    """Of a number, or of each number of a tuple."""
    low = 1e-3 if field.switch or field.low is None else field.low
    high = 0.5 if field.below is None and field.high is None else 0.999
    parts = len(field.default) if isinstance(field.default, tuple) else 1
    return _RANGES.get(name, [(low, high)] * parts)


def sample(name: str, field: Number, fraction: float = 0.6) -> Any:
    """A value that has an effect, this far into its range; the numbers of a tuple differ."""
    digits = None if field.integer else 4
    parts = tuple(
        round(low + (high - low) * (fraction + 0.2 * i), digits) for i, (low, high) in enumerate(ranges(name, field))
    )
    return parts if isinstance(field.default, tuple) else parts[0]


def filled(field: Number, value: float) -> Any:
    """This value, or a tuple of it where the number is a tuple."""
    return (value,) * len(field.default) if isinstance(field.default, tuple) else value


def numbers_of(cls: type[compiled_optim.Optimizer]) -> dict[str, Number]:
    return {k: v for k, v in cls.rule.declaration.options.items() if isinstance(v, Number)}


def switch_sets(cls: type[compiled_optim.Optimizer]) -> list[dict[str, Any]]:
    """The combinations of switches that torch accepts, each once: as many kernels for each dtype.

    ``maximize`` negates the gradient before any rule sees it: it is on alone and with all others.
    """
    fields = {k: v for k, v in cls.rule.declaration.options.items() if v.init and v.switch and k != "maximize"}
    on = {k: not v.default if isinstance(v, Flag) else sample(k, v) for k, v in fields.items()}
    subsets = itertools.chain.from_iterable(itertools.combinations(on, n) for n in range(len(on) + 1))
    sets = [{k: on[k] for k in subset} for subset in subsets]
    sets = [options for options in sets if accepted(cls, options)]
    if "maximize" not in cls.rule.declaration.options:
        return sets
    return [*sets, {"maximize": True}, *([{**sets[-1], "maximize": True}] if sets[-1] else [])]


def option_sets(cls: type[compiled_optim.Optimizer]) -> Iterator[dict[str, Any]]:
    """Every combination of switches, and another value of every number."""
    yield from switch_sets(cls)
    numbers = {k: sample(k, v) for k, v in numbers_of(cls).items()}
    switched = {k: v for k, v in numbers.items() if numbers_of(cls)[k].switch}  # so that the number has an effect
    for name, value in numbers.items():
        options = {**switched, name: value}
        if name not in switched and accepted(cls, options):
            yield options


def rich_options(cls: type[compiled_optim.Optimizer]) -> dict[str, Any]:
    """As many switches at once as torch accepts."""
    return max(switch_sets(cls), key=len)


def with_all_numbers(cls: type[compiled_optim.Optimizer], switches: dict[str, Any]) -> dict[str, Any]:
    """These switches, and all numbers that torch accepts beside them at values that have an effect."""
    options = dict(switches)
    for name, field in numbers_of(cls).items():
        more = {**options, name: sample(name, field)}
        if not field.switch and accepted(cls, more):
            options = more
    return options


def accepted(cls: type[compiled_optim.Optimizer], options: dict[str, Any], dtype: torch.dtype = torch.float32) -> bool:
    if dtype.is_complex and not cls.accepts_complex:  # which torch refuses in the first step
        return False
    try:
        oracle(cls)([torch.zeros(1, 1, dtype=dtype, requires_grad=True)], **options)
    except ValueError:
        return False
    return True


def named(options: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"


ALL = [(cls, options) for cls in CLASSES for options in option_sets(cls)]
IDS = [f"{cls.__name__}-{named(options)}" for cls, options in ALL]
FEW = [(cls, options) for cls in CLASSES for options in ({}, rich_options(cls))]
FEW_KERNELS = [(cls, options) for cls, options in FEW if cls.elementwise]
# of narrower dtypes: a kernel takes seconds to compile, so all switches only where torch's fused kernels set the bar
NARROW = [(cls, options) for cls, options in FEW if not options or "fused" in cls.rule.declaration.options]
