"""What happens when a step cannot run compiled: one warning that says what to do, or an error in strict mode."""

from __future__ import annotations

import warnings

from compiled_optim import settings


class CompileFallbackWarning(UserWarning):
    """A step that was to be compiled runs in another way; the message says why and what to do about it."""


class CompileError(RuntimeError):
    """A step could not be compiled and ``COMPILED_OPTIM_STRICT=1`` forbids to fall back."""


def fall_back(seen: set[str], reason: str, remedy: str) -> None:
    """Warns once for each reason in ``seen``.

    Raises:
        CompileError: in strict mode. Called before anything is written, so parameters and state are untouched.
    """
    message = f"{reason}; {remedy}"
    if settings.strict():
        raise CompileError(f"{message} (an error because COMPILED_OPTIM_STRICT=1)")
    if reason not in seen:
        seen.add(reason)
        settings.logger.warning("%s", message)
        warnings.warn(message, CompileFallbackWarning, stacklevel=2)
