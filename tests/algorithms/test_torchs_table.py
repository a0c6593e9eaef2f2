"""The inputs and the errors with which the installed torch tests its own optimizers, given to ours."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from beside_torch import Lockstep, tensors
from cases import fitted
from exactness import assert_no_less_exact
from minimizing import initial, network

import compiled_optim

# In a process of its own, because the import changes settings of torch. Of expecttest it needs a name only.
TABLE = """
import pickle, sys, types, unittest
import torch
sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
from torch.testing._internal.common_optimizers import optim_db
table = {}
for info in optim_db:
    inputs = [i.kwargs for i in info.optim_inputs_func("cpu", torch.float64)]
    errors = [
        (e.optimizer_error_input.desc, e.optimizer_error_input.params, e.optimizer_error_input.kwargs, e.error_type)
        for e in info.optim_error_inputs_func("cpu", torch.float64)
    ]
    table[info.optim_cls.__name__] = inputs, errors
pickle.dump(table, sys.stdout.buffer)
"""


@functools.cache
def table() -> dict[str, Any]:
    """For each optimizer its options and errors (description, params, options, type)."""
    made = subprocess.run([sys.executable, "-c", TABLE], capture_output=True, check=True)
    found: dict[str, Any] = pickle.loads(made.stdout)
    return found


# torch's list code without `capturable` takes no hyperparameters that are tensors; ours does.
TAKEN = re.compile("(lr|betas.*) as (a )?Tensor .*foreach")
NAMES = sorted(name for name, cls in vars(torch.optim).items() if isinstance(cls, type) and name != "Optimizer")
each_name = pytest.mark.parametrize("name", NAMES)


def pair(name: str, options: dict[str, Any]) -> Lockstep:
    initial = [fitted(getattr(torch.optim, name), t) for t in tensors([(), (7,), (3, 5), (2, 3, 4)])]
    return Lockstep(*(lambda ps, of=of: getattr(of, name)(ps, **copy.deepcopy(options)) for of in BOTH), initial)


BOTH = (torch.optim, compiled_optim)


def test_the_table_has_every_optimizer() -> None:
    assert sorted(table()) == NAMES


@each_name
def test_inputs(name: str) -> None:
    torch.set_default_dtype(torch.float64)  # of it is what torch carries from step to step
    for options in table()[name][0]:
        # with an lr of float32 torch computes in float32
        options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        if name == "LBFGS":
            run = Lockstep(
                *(lambda ps, of=of, o=options: of.LBFGS(ps, **copy.deepcopy(o)) for of in BOTH), initial(network)
            )
            run.both(lambda optimizer, params: minimize(optimizer, params))
            run.compare_parameters(1e-10)
            continue
        run = pair(name, options)
        run.step(5)
        run.compare(1e-10)


def minimize(optimizer: Any, params: list[Any]) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = network(*params)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "LBFGS"])
def test_inputs_in_float32(name: str) -> None:
    for options in table()[name][0]:
        assert_no_less_exact(getattr(compiled_optim, name), options, torch.float32)


@each_name
def test_errors(name: str) -> None:
    """Are refused by both, in the constructor or the step, with an error of the same type."""
    for what, params, options, error in table()[name][1]:
        for of in BOTH[:1] if TAKEN.match(what) else BOTH:
            given = [torch.nn.Parameter(torch.ones(1, 1))] if params is None else params
            with pytest.raises(error):  # noqa: PT012
                optimizer = getattr(of, name)(given, **options)
                for p in optimizer.param_groups[0]["params"]:
                    p.grad = torch.ones_like(p)
                optimizer.step()
                pytest.fail(f"{of.__name__}.{name} takes what torch refuses: {what}")
