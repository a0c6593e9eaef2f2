"""The names of ``torch.optim.rmsprop``."""

from compiled_optim.algorithms import RMSprop
from compiled_optim.functional import rmsprop

__all__ = ["RMSprop", "rmsprop"]
