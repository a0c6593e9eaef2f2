"""The algorithms, one file each: fields, ``scalars`` and one ``update``. Nothing here knows of compilers."""

from compiled_optim.algorithms.adam import Adam, AdamW
from compiled_optim.algorithms.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
