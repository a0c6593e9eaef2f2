"""Functions that users give a schedule: of numbers, and where they can be traced, of tensors and symbols too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from compiled_optim.lr_scheduler.formulas import is_symbolic


class UserFunction:
    """A user's function of one number. It is called with numbers only.

    What it makes of a tensor or a symbol is an expression that `symbolic.traced` finds when one is first asked for.

    Args:
        function: called with an integer where the step is a whole number, as torch calls it.
        name, first: as for `symbolic.traced`, and so are the errors.
    """

    def __init__(self, function: Callable[[Any], Any], name: str, first: int = 0) -> None:
        self._function, self._name, self._first = function, name, first

    def __call__(self, x: Any) -> Any:
        if isinstance(x, Tensor) or is_symbolic(x):
            return self._formula(x)
        return self._function(int(x) if x == x // 1 else x)

    @functools.cached_property
    def _formula(self) -> Callable[[Any], Any]:
        from compiled_optim.lr_scheduler.symbolic import applied, traced

        return applied(traced(self._function, self._name, self._first))
