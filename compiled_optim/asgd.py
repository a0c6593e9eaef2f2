"""The names of ``torch.optim.asgd``."""

from compiled_optim.algorithms import ASGD
from compiled_optim.functional import asgd

__all__ = ["ASGD", "asgd"]
