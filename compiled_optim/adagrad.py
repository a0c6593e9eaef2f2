"""The names of ``torch.optim.adagrad``."""

from compiled_optim.algorithms import Adagrad
from compiled_optim.functional import adagrad

__all__ = ["Adagrad", "adagrad"]
