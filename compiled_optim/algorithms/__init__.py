"""The algorithms, one file each: fields, ``scalars`` and one ``update``. Nothing here knows of compilers."""

from compiled_optim.algorithms.adadelta import Adadelta
from compiled_optim.algorithms.adafactor import Adafactor
from compiled_optim.algorithms.adagrad import Adagrad
from compiled_optim.algorithms.adam import Adam, AdamW
from compiled_optim.algorithms.adamax import Adamax
from compiled_optim.algorithms.asgd import ASGD
from compiled_optim.algorithms.muon import Muon
from compiled_optim.algorithms.muon_adamw import MuonAdamW
from compiled_optim.algorithms.nadam import NAdam
from compiled_optim.algorithms.radam import RAdam
from compiled_optim.algorithms.rmsprop import RMSprop
from compiled_optim.algorithms.rprop import Rprop
from compiled_optim.algorithms.sgd import SGD
from compiled_optim.algorithms.sparse_adam import SparseAdam

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "MuonAdamW",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
]
