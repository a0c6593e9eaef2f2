"""The names of ``torch.optim.sparse_adam``."""

from compiled_optim.algorithms import SparseAdam

__all__ = ["SparseAdam"]
