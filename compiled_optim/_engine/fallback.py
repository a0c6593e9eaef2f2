"""What happens when a step cannot run compiled: one warning that says what to do, or an error in strict mode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from compiled_optim._engine import settings
from compiled_optim._engine.cache.compiler import BuildError
from compiled_optim._engine.cache.native import NoCompilerError
from compiled_optim._engine.torch_private import dynamo
from compiled_optim._engine.torch_private.inductor import LoweringError, UntraceableError

# What may be raised while something is traced, lowered, compiled and loaded: reasons to fall back.
COMPILE_ERRORS = (NoCompilerError, BuildError, LoweringError, UntraceableError, OSError, ImportError)


class CompileFallbackWarning(UserWarning):
    """A step that was to be compiled runs in another way; the message says why and what to do about it."""


class CompileError(RuntimeError):
    """A step could not be compiled and ``COMPILED_OPTIM_STRICT=1`` forbids to fall back."""


class Fallback:
    """Why one optimizer or average does not run compiled, and what its user was told of that.

    Attributes:
        given_up: why nothing of it is compiled any more, or an empty string.
    """

    def __init__(self, what: str = "the optimizer steps eagerly") -> None:
        self.given_up = ""
        self._what = what
        self._told: set[Any] = set()

    def reason(self) -> str:
        """Why nothing is to be compiled now, or an empty string."""
        return switched_off() or self.given_up

    def tell(self, reason: str, remedy: str, kind: Any = None) -> None:
        """Warns once for each reason, or for each ``kind`` of reason where that is given.

        Raises:
            CompileError: in strict mode. Called before anything is written, so parameters and state are untouched.
        """
        message = f"{reason}; {remedy}"
        if settings.strict():
            raise CompileError(f"{message} (an error because COMPILED_OPTIM_STRICT=1)")
        kind = kind or reason
        if kind not in self._told:
            self._told.add(kind)
            settings.warn(message, CompileFallbackWarning)

    def give_up(self, reason: str, remedy: str) -> str:
        """Tells of a reason that will not go away, and returns it. Raises what `tell` raises."""
        self.tell(f"{self._what}: {reason}", remedy)
        self.given_up = reason
        return reason

    def tell_of(self, refused: Iterable[tuple[Tensor, str]], noun: str, done: str) -> None:
        """Warns once for each device and reason that tensors are refused for. Raises what `tell` raises.

        Args:
            noun: what they are, such as "parameter"; done: what happens to them, such as "updated eagerly".
        """
        kinds: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        for tensor, why in refused:
            kinds[str(tensor.device), why].append(tensor)
        for (device, why), (first, *others) in kinds.items():
            shape = tuple(first.shape)
            one = f"a {noun} of shape {shape} is"
            which = f"{1 + len(others)} {noun}s, the first of shape {shape}, are" if others else one
            remedy = "the others are compiled; a plain dense tensor would be too"
            self.tell(f"{which} {done}, because {why}", remedy, (device, why))


def switched_off() -> str:
    """Why nothing is to be compiled now, or an empty string."""
    return dynamo.compiling_disabled() or ("COMPILED_OPTIM_DISABLE=1" if settings.disabled() else "")


def watched() -> tuple[tuple[Any, ...], ...]:
    """Where the host module sees that nothing is `switched_off`: see `quick` in host.cpp."""
    return *dynamo.watched(), *settings.watched("TORCH_COMPILE_DISABLE", "COMPILED_OPTIM_DISABLE")
