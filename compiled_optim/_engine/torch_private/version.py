"""Which version of torch this is, and which private parts it lacks."""

from __future__ import annotations

import torch

# The version range that the tests have passed with: from this one to below that one.
SUPPORTED = ((2, 11), (2, 16))
# What the modules of this package could not import. Steps are then eager and outside of graphs, for this reason.
missing: list[str] = []


def torch_version() -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def lacks(error: Exception) -> str:
    """The reason for a part that could not be imported."""
    return f"torch {torch.__version__} lacks a part that compiled_optim needs: {error}"


def unsupported_version() -> str | None:
    """Why this version of torch is not known to work, or None."""
    low, below = SUPPORTED
    if low <= torch_version() < below:
        return missing[0] if missing else None
    known = f">={low[0]}.{low[1]},<{below[0]}.{below[1]}"
    return f"torch {torch.__version__} is not known to work: compiled_optim was checked with torch{known}"
