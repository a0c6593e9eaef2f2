"""The names of ``torch.optim.radam``."""

from compiled_optim.algorithms import RAdam
from compiled_optim.functional import radam

__all__ = ["RAdam", "radam"]
