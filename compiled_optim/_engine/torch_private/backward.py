"""The backward pass that runs in this thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compiled_optim._engine.torch_private import version

_engine: Any
try:
    from torch._C import _current_graph_task_id
    from torch.autograd import Variable

    _engine = Variable._execution_engine
    _engine.queue_callback  # noqa: B018
except (ImportError, AttributeError) as error:
    version.missing.append(version.lacks(error))


def backward_pass() -> int:
    """A number that no other backward pass has; -1 outside of any."""
    return -1 if version.missing else _current_graph_task_id()


def at_its_end(action: Callable[[], None]) -> None:
    """Calls a function when all gradients of this pass have been accumulated, unless it raises."""
    _engine.queue_callback(action)
