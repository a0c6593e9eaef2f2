"""What happens when a step cannot run compiled: one warning that says what to do, or an error in strict mode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from compiled_optim._engine import settings


class CompileFallbackWarning(UserWarning):
    """A step that was to be compiled runs in another way; the message says why and what to do about it."""


class CompileError(RuntimeError):
    """A step could not be compiled and ``COMPILED_OPTIM_STRICT=1`` forbids to fall back."""


def fall_back(seen: set[Any], reason: str, remedy: str, kind: Any = None) -> None:
    """Warns once for each reason in ``seen``, or for each ``kind`` of reason where that is given.

    Raises:
        CompileError: in strict mode. Called before anything is written, so parameters and state are untouched.
    """
    message = f"{reason}; {remedy}"
    if settings.strict():
        raise CompileError(f"{message} (an error because COMPILED_OPTIM_STRICT=1)")
    kind = kind or reason
    if kind not in seen:
        seen.add(kind)
        settings.warn(message, CompileFallbackWarning)


def fall_back_for(seen: set[Any], refused: Iterable[tuple[Tensor, str]], noun: str, done: str) -> None:
    """Warns once for each device and reason that tensors are refused for.

    Args:
        noun: what they are, such as "parameter"; done: what happens to them, such as "updated eagerly".

    Raises:
        CompileError: in strict mode.
    """
    kinds: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for tensor, why in refused:
        kinds[str(tensor.device), why].append(tensor)
    for (device, why), (first, *others) in kinds.items():
        shape = tuple(first.shape)
        which = (
            f"{1 + len(others)} {noun}s, the first of shape {shape}, are" if others else f"a {noun} of shape {shape} is"
        )
        remedy = "the others are compiled; a plain dense tensor would be too"
        fall_back(seen, f"{which} {done}, because {why}", remedy, (device, why))
