"""Where a torch.nn.Module keeps what it holds."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module

# The attributes that are dicts of parameters, of buffers and of modules.
HELD = ("_parameters", "_buffers", "_modules")


def tensors(module: Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters and the buffers of a module and of those below it; tied ones at each place.

    In one walk. torch's two walks take half of the time of a small average.
    """
    modules = list(module.modules())
    parameters: list[Tensor] = [p for m in modules for p in m._parameters.values() if p is not None]
    return parameters, [b for m in modules for b in m._buffers.values() if b is not None]
