"""The names of ``torch.optim.adamw``."""

from compiled_optim.algorithms import AdamW
from compiled_optim.functional import adamw

__all__ = ["AdamW", "adamw"]
