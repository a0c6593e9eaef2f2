"""The names of ``torch.optim.adadelta``."""

from compiled_optim.algorithms import Adadelta
from compiled_optim.functional import adadelta

__all__ = ["Adadelta", "adadelta"]
