"""Where a torch.nn.Module keeps what it holds."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module

# The attributes that are dicts of parameters, of buffers and of modules.
HELD = ("_parameters", "_buffers", "_modules")


def tensors(module: Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters and the buffers of a module and of those below it; tied ones at each place.

    In one walk. The generators of torch take half of the time of a small average.
    """
    parameters: list[Tensor] = []
    buffers: list[Tensor] = []
    seen = set()

    def visit(m: Module) -> None:
        seen.add(m)
        parameters.extend([p for p in m._parameters.values() if p is not None])
        buffers.extend([b for b in m._buffers.values() if b is not None])
        for child in m._modules.values():
            if child is not None and child not in seen:
                visit(child)

    visit(module)
    return parameters, buffers
