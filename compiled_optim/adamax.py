"""The names of ``torch.optim.adamax``."""

from compiled_optim.algorithms import Adamax
from compiled_optim.functional import adamax

__all__ = ["Adamax", "adamax"]
