"""The names of ``torch.optim.adam``."""

from compiled_optim.algorithms import Adam
from compiled_optim.functional import adam

__all__ = ["Adam", "adam"]
