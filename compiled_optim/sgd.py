"""The names of ``torch.optim.sgd``."""

from compiled_optim.algorithms import SGD
from compiled_optim.functional import sgd

__all__ = ["SGD", "sgd"]
