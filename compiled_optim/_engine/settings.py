"""Environment variables, logging and warnings. A variable is read at each use, so a change takes effect at once."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

logger = logging.getLogger("compiled_optim")


def warn(message: str, category: type[Warning]) -> None:
    """Warns at the line of the user's code that led here, and logs the message, which prints nothing by default."""
    logger.info("%s", message)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("compiled_optim", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def cache_directory() -> Path | None:
    """Where native code is kept: `COMPILED_OPTIM_CACHE_DIR`, else `compiled_optim` in `XDG_CACHE_HOME` or `~/.cache`.

    Returns:
        An absolute path, which need not exist; None if nothing is set and this user has no home directory.
    """
    if chosen := os.environ.get("COMPILED_OPTIM_CACHE_DIR"):
        return Path(os.path.expanduser(chosen)).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification: ignore a relative path
        base = Path(os.path.expanduser("~")) / ".cache"
    return base / "compiled_optim" if base.is_absolute() else None


def disk_cache() -> bool:
    """Whether native code may be kept on disk (`COMPILED_OPTIM_DISK_CACHE`, on unless set to 0)."""
    return _switch("COMPILED_OPTIM_DISK_CACHE", default=True)


def cache_limit() -> int:
    """How many bytes may be kept on disk (`COMPILED_OPTIM_CACHE_LIMIT`, 256M unless set; K, M or G are powers of 1024).

    Raises:
        ValueError: the variable is something else.
    """
    value = os.environ.get("COMPILED_OPTIM_CACHE_LIMIT", "")
    given = re.fullmatch(r"([0-9]+)([KMG]?)", value or "256M")
    if given is None:
        raise ValueError(f"COMPILED_OPTIM_CACHE_LIMIT={value!r}: expected bytes, such as 90000, 512K or 2G, or nothing")
    return int(given[1]) << 10 * " KMG".index(given[2] or " ")


def disabled() -> bool:
    """Whether every optimizer steps eagerly, whatever it was asked for (`COMPILED_OPTIM_DISABLE`)."""
    return _switch("COMPILED_OPTIM_DISABLE", default=False)


def watched(*variables: str) -> tuple[tuple[Any, ...], ...]:
    """Where the host module sees that environment variables are not set: see `quick` in host.cpp."""
    environ: Any = os.environ
    return (vars(os), "environ", environ), *((environ._data, environ.encodekey(v), None) for v in variables)


def strict() -> bool:
    """Whether a step that cannot be compiled is an error rather than an eager step (`COMPILED_OPTIM_STRICT`)."""
    return _switch("COMPILED_OPTIM_STRICT", default=False)


def _switch(variable: str, *, default: bool) -> bool:
    value = os.environ.get(variable, "")
    try:
        return {"": default, "0": False, "false": False, "1": True, "true": True}[value.lower()]
    except KeyError:
        raise ValueError(f"{variable}={value!r}: expected 0, 1, true, false or nothing") from None
