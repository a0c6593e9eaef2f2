"""What will run for an optimizer, worked out without running it, and for GPUs without one.

``python -m compiled_optim inspect AdamW --amsgrad --dtype bf16 --target sm_90``
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any, NoReturn

import torch

from compiled_optim import algorithms, inspection
from compiled_optim._engine.cache.compiler import BuildError
from compiled_optim._engine.documentation import SHARED
from compiled_optim._engine.torch_private.inductor import LoweringError, UntraceableError
from compiled_optim.declare import Flag
from compiled_optim.optimizer import Optimizer

_TARGETS = ("cpu", *(f"sm_{n}" for n in (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)))
_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}

# What one pass does beside the update, as far as it decides a kernel, with the values of flags that are given none.
_AROUND = {
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
    "ema_decay": 0.999,
    "master_weights": True,
    "stochastic_rounding": True,
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        line = message.strip().partition("\n")[0]
        self.exit(2, f"{self.prog}: {line}\n")


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    parser = _Parser(prog="python -m compiled_optim", description=__doc__)
    parser.add_argument("command", choices=["inspect"])
    parser.add_argument("optimizer", help=f"module:class, or one of {', '.join(algorithms.__all__)}")
    name = parser.parse_args(given[:2]).optimizer
    try:
        cls = _class_of(name)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    parser = _parser_of(cls, name)
    chosen = parser.parse_args(given[2:])
    options = {name: getattr(chosen, name) for name in (*inspection.switches_of(cls), *_AROUND)}
    dtypes = (_DTYPES[chosen.dtype], _DTYPES.get(chosen.state_dtype))
    try:
        signature = inspection.signature_of(cls, options, *dtypes, chosen.target, chosen.on_device)
        text = _text(inspection.Inspection(signature), chosen.part, chosen.bandwidth)
    except (ValueError, BuildError, LoweringError, UntraceableError) as error:
        parser.error(str(error).removeprefix(f"{cls.__name__}: "))
    print(text)


def _class_of(name: str) -> type[Optimizer]:
    module, colon, of_module = name.partition(":")
    if colon:
        cls = getattr(importlib.import_module(module), of_module, None)
    else:
        cls = getattr(algorithms, name) if name in algorithms.__all__ else None
    if not (isinstance(cls, type) and issubclass(cls, Optimizer) and cls.rule.declaration.options):
        raise ValueError(f"an optimizer must be module:class or one of {', '.join(algorithms.__all__)}, got {name!r}")
    return cls


def _parser_of(cls: type[Optimizer], name: str) -> _Parser:
    parser = _Parser(prog=f"python -m compiled_optim inspect {name}", allow_abbrev=False)
    for switch, field in inspection.switches_of(cls).items():
        how: dict[str, Any] = {"action": "store_true"}
        if not isinstance(field, Flag):
            how = {"nargs": "?", "type": float, "const": 0.1, "default": field.default, "metavar": "VALUE"}
        parser.add_argument(f"--{switch.replace('_', '-')}", dest=switch, help=field.help or None, **how)
    for name, value in _AROUND.items():
        how = {"action": "store_true"}
        if value is not True:
            how = {"nargs": "?", "type": float, "const": value, "metavar": "VALUE"}
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=SHARED[name], **how)
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of parameters and gradients (default: fp32)")
    parser.add_argument("--state-dtype", choices=_DTYPES, help="of the moments (default: as by declaration)")
    parser.add_argument("--target", choices=_TARGETS, default="cpu", help="cpu, or a kind of GPU (default: cpu)")
    parser.add_argument("--on-device", action="store_true", help="steps are counted on the GPU, as if capturable")
    parser.add_argument("--bandwidth", type=float, default=1000, help="GB/s, to predict times (default: 1000)")
    parts = parser.add_mutually_exclusive_group()
    kinds = {"fx": "graph", "source": "C++ or Triton source", "ptx": "PTX", "cost": "bytes, operations and time"}
    for part, what in kinds.items():
        parts.add_argument(f"--{part}", dest="part", action="store_const", const=part, help=f"print the {what}")
    return parser


def _text(found: inspection.Inspection, part: str | None, bandwidth: float) -> str:
    if not bandwidth > 0:
        raise ValueError(f"--bandwidth must be above 0 GB/s, got {bandwidth}")
    if part == "fx":
        return found.graph
    if part == "source":
        return "\n\n".join(found.sources)
    if part == "ptx":
        if not found.programs:
            raise ValueError(f"a kernel for {found.signature.backend} has no PTX")
        return "\n\n".join(program.ptx for program in found.programs)
    if part == "cost":
        return "\n".join(inspection.describe(found.cost, bandwidth, len(found.sources)))
    return "\n".join(inspection.summary(found, bandwidth))


if __name__ == "__main__":
    main()
