"""L-BFGS: torch.optim.LBFGS with the vector work of an iteration compiled, in two launches."""

from compiled_optim.lbfgs.optimizer import LBFGS

__all__ = ["LBFGS"]
