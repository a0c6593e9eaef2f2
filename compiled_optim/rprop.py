"""The names of ``torch.optim.rprop``."""

from compiled_optim.algorithms import Rprop
from compiled_optim.functional import rprop

__all__ = ["Rprop", "rprop"]
