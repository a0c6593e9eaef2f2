"""The names of ``torch.optim.nadam``."""

from compiled_optim.algorithms import NAdam
from compiled_optim.functional import nadam

__all__ = ["NAdam", "nadam"]
