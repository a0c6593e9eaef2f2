"""Kernels of bfloat16 and float16 tensors, bit by bit against their rules in torch's operations."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from cases import ELEMENTWISE, rich_options
from torch import Tensor

import compiled_optim
from compiled_optim._engine.kernels import registry
from compiled_optim._engine.kernels.trace import Signature, trace
from compiled_optim._engine.rule import first_scalars
from compiled_optim.inspection import signature_of

# vectors of 4 to 32 elements, whole, in part, and several with a rest
SIZES = range(71)
# what rounding has to keep: ties to even, the largest numbers, denormal ones, infinities, NaN
ODD = [0.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.3895314e38, 65519.0, -1e-40, 6e-8, float("inf"), -float("inf"), float("nan")]
WIDE, BRAIN, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64


def values(dtype: torch.dtype, positive: bool) -> Tensor:
    """Elements for all sizes, some of them odd, that begin one after a multiple of a vector."""
    random = torch.randn(sum(SIZES) + 1).double()
    random[::7] = torch.tensor(ODD, dtype=DOUBLE).repeat(len(random))[: len(random[::7])]
    return (random.abs() if positive else random).to(dtype)[1:]


def launch(signature: Signature, flat: list[Tensor], scalars: list[float]) -> None:
    """One launch for tensors of all `SIZES`, which lie end to end in the flat ones, so that few are aligned."""
    _, kernels = registry.get([signature])
    begins = [0, *accumulate(SIZES)]
    table = [t.data_ptr() + begin * t.itemsize for begin in begins[:-1] for t in flat]
    entry = ctypes.CFUNCTYPE(None, ctypes.c_int64, *[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.c_void_p)
    entry(kernels[signature].entry)(
        len(SIZES),
        (ctypes.c_void_p * len(table))(*table),
        (ctypes.c_int64 * len(begins))(*begins),
        (ctypes.c_int32 * len(SIZES))(),
        (ctypes.c_double * len(scalars))(*scalars),
        None,
        len(scalars),
        1,
    )


class Exact(torch.fx.Interpreter):
    """Runs a trace operation by operation, each rounded as IEEE 754 says."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.sqrt.default:  # torch may take MKL's, which is an ulp off
            return args[0].double().sqrt().to(args[0].dtype)
        return super().call_function(target, args, kwargs)


def assert_equals_its_rule(
    cls: Any, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], options: dict[str, Any]
) -> None:
    """Args: dtypes: of parameters, gradients and buffers."""
    dtype, grad_dtype, state_dtype = dtypes
    signature = signature_of(cls, options, dtype, state_dtype)
    signature = replace(signature, grad_dtype=None if grad_dtype == dtype else grad_dtype)
    flat = [values(d, positive=i > 1) for i, d in enumerate(signature.flat_dtypes)]
    expected = [t.clone() for t in flat]
    hyper = cls.rule.declaration.read(cls.rule.declaration.check({**options})).hyper
    scalars = [float(v) for v in first_scalars(cls.rule, hyper).values()]
    launch(signature, flat, scalars)
    Exact(trace(signature).graph).run(*expected, *(torch.tensor(s, dtype=signature.scalar_dtype) for s in scalars))
    for name, actual, wanted in zip(signature.flat, flat, expected, strict=True):
        torch.testing.assert_close(
            actual, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("cls", ELEMENTWISE, ids=lambda cls: cls.__name__)
def test_moments_in_bfloat16(cls: type[compiled_optim.Optimizer]) -> None:
    assert_equals_its_rule(cls, (WIDE, WIDE, BRAIN), rich_options(cls))


@pytest.mark.parametrize(
    "dtypes",
    [
        (BRAIN, BRAIN, BRAIN),
        (BRAIN, BRAIN, WIDE),
        (BRAIN, DOUBLE, WIDE),
        (HALF, HALF, HALF),
        (HALF, BRAIN, WIDE),
        (DOUBLE, WIDE, BRAIN),
    ],
    ids=lambda dtypes: ",".join(str(d).removeprefix("torch.") for d in dtypes),
)
def test_any_mix_of_dtypes(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    assert_equals_its_rule(compiled_optim.AdamW, dtypes, {})
