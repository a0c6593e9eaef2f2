"""``compiled_optim.functional``: torch's functional optimizers, on the same arguments, are the oracle."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import MATRICES, assert_same, tensors
from cases import ALL, CLASSES, IDS, gradient, oracle, rich_options
from torch import Tensor

import compiled_optim
from compiled_optim import Optimizer, functional

KEYS = {"state_steps": "step", "state_sums": "sum", "momentum_buffer_list": "momentum_buffer"}
KEYS |= {"muon_momentum_bufs": "momentum_buffer"}
NAMES = {"etaminus": "eta1", "etaplus": "eta2", "step_size_min": "step_size1", "step_size_max": "step_size2"}
OPTIONAL = {"max_exp_avg_sqs": "amsgrad", "grad_avgs": "centered", "momentum_buffer_list": "momentum"}
FUNCTIONS = {name.replace("_", ""): name for name in functional.__all__}
Call = tuple[list[Any], dict[str, Any]]
every_function = pytest.mark.parametrize("name", functional.__all__)


def ours(cls: type[Optimizer]) -> Callable[..., None]:
    return getattr(functional, FUNCTIONS[cls.__name__.lower()])  # type: ignore[no-any-return]


def theirs(name: str) -> Callable[..., None]:
    """Torch's function, which has had its place in `torch.optim.functional` since 2.15."""
    modules = {"sparse_adam": "_functional", "adafactor": "_adafactor", "muon": "_muon"}
    return getattr(importlib.import_module(f"torch.optim.{modules.get(name, name)}"), name)  # type: ignore[no-any-return]


def call(cls: type[Optimizer], options: dict[str, Any], dtype: torch.dtype = torch.float64) -> Call:
    """Lists for the arguments that are some, with the state that torch.optim has after a step, and options."""
    params = [torch.nn.Parameter(t) for t in tensors(MATRICES, dtype)]
    optimizer = oracle(cls)(params, **options)
    for p in params:
        p.grad = gradient(cls, p)
    optimizer.step()
    arguments = inspect.signature(ours(cls)).parameters.values()
    names = [p.name for p in arguments if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
    lists: list[Any] = [[p.detach() for p in params], [gradient(cls, p) for p in params]]
    group = optimizer.param_groups[0]
    for name in names[2:]:
        key = KEYS.get(name, name.removesuffix("s"))
        kept = group.get(OPTIONAL.get(name, ""), True)
        lists.append([optimizer.state[p].get(key) for p in params] if kept else [])
    values = dict(group)
    for option in cls.rule.declaration.options:
        if isinstance(group[option], tuple | list):
            values |= zip(cls.rule.declaration.rule_names(option), group[option], strict=True)
    rest = {"foreach", "capturable", "differentiable", "fused"}  # how, not what
    return lists, {
        p.name: values[n] for p in arguments if (n := NAMES.get(p.name, p.name)) in values.keys() - rest - {*names}
    }


def copied(lists: list[Any]) -> list[Any]:
    return [[t.clone() if isinstance(t, Tensor) else t for t in values] for values in lists]


def assert_agree(mine: list[Any], stock: list[Any], rtol: float = 1e-12) -> None:
    for position, (ours, theirs) in enumerate(zip(mine, stock, strict=True)):
        assert len(ours) == len(theirs)
        for actual, expected in zip(ours, theirs, strict=True):
            if not isinstance(expected, Tensor):
                assert actual == expected
            elif expected.is_sparse:
                assert torch.equal(actual.to_dense(), expected.to_dense())
            else:
                assert_same(actual, expected, rtol, f"argument {position}")


@every_function
def test_signatures_are_torchs(name: str) -> None:
    """Those of torch 2.15; older ones differ in annotations only."""
    mine, stock = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (getattr(functional, name), theirs(name))
    )
    assert mine == stock


@pytest.mark.parametrize(("cls", "options"), ALL, ids=IDS)
def test_updates_are_torchs(cls: type[Optimizer], options: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)
    mine, chosen = call(cls, options)
    stock = copied(mine)
    arguments = inspect.signature(ours(cls)).parameters
    for foreach in ({}, {"foreach": False}):
        extra: dict[str, Any] = foreach if "foreach" in arguments else {}
        extra |= {"has_complex": False} if "has_complex" in arguments else {}  # has no default everywhere
        for _ in range(2):
            fresh = [gradient(cls, p) for p in mine[0]]
            mine[1], stock[1] = fresh, [g.clone() for g in fresh]
            with torch.no_grad():
                ours(cls)(*mine, **chosen, **extra)
                theirs(ours(cls).__name__)(*stock, **chosen, **extra)
            if cls.__name__ == "SparseAdam":  # whose caller counts
                mine[-1], stock[-1] = ([n + 1 for n in steps[-1]] for steps in (mine, stock))
        assert_agree(mine, stock)


@pytest.mark.parametrize("name", ["Adam", "SGD"])  # with a step count and without
def test_fused_launches_a_kernel_and_scales_as_torch_does(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    cls = getattr(compiled_optim, name)
    compiled_optim.cache_clear()
    mine, chosen = call(cls, {})
    chosen |= {"fused": True, "foreach": False}
    stock = copied(mine)
    scale, no, yes = (torch.tensor(value, dtype=torch.float32) for value in (8.0, 0.0, 1.0))
    for scaling in ({}, {"grad_scale": scale, "found_inf": no}, {"grad_scale": scale, "found_inf": yes}):
        with torch.no_grad():
            ours(cls)(*mine, **chosen, **scaling)
            theirs(ours(cls).__name__)(*stock, **chosen, **scaling)
        if scaling and scaling["found_inf"] is yes:
            mine[1] = stock[1]  # torch divides the gradients of a step that it skips, too
        assert_agree(mine, stock, 1e-10)
    assert compiled_optim.cache_info().kernels == 1


def test_a_first_momentum_is_put_into_the_list() -> None:
    params, grads = tensors(MATRICES), tensors(MATRICES)
    buffers: list[Any] = [None] * len(params)
    options = {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "nesterov": False, "maximize": True, "lr": 0.1}
    stock = copied([params, grads, buffers])
    for _ in range(2):
        functional.sgd(params, grads, buffers, **options)
        theirs("sgd")(*stock, **options)
        assert_agree([params, grads, buffers], stock)


def test_step_counts_of_any_dtype_are_advanced_in_place() -> None:
    mine, chosen = call(CLASSES[[c.__name__ for c in CLASSES].index("Adam")], {})
    mine[-1] = [torch.tensor(n, dtype=torch.int64) for n in (4, 5, 6)]
    counts = [*mine[-1]]
    functional.adam(*mine, **chosen)
    assert [int(n) for n in counts] == [5, 6, 7]
    assert all(a is b for a, b in zip(counts, mine[-1], strict=True))


@pytest.mark.parametrize("name", ["Adam", "SGD", "ASGD", "RMSprop", "Rprop"])
def test_derivatives_of_an_update_are_torchs(name: str) -> None:
    """With respect to the gradient and, where torch has it, the learning rate."""
    torch.set_default_dtype(torch.float64)
    (cls,) = [c for c in CLASSES if c.__name__ == name]
    mine, chosen = call(cls, rich_options(cls))
    results = []
    for function, lists in ((ours(cls), copied(mine)), (theirs(name.lower()), copied(mine))):
        grads = [g.clone().requires_grad_() for g in lists[1]]
        lists[1] = [g * 1 for g in grads]
        if "differentiable" in inspect.signature(function).parameters:
            chosen |= {"differentiable": True}
        function(*lists, **chosen, foreach=False)
        results.append([*torch.autograd.grad(sum(p.square().sum() for p in lists[0]), grads), *lists[0]])
    assert_agree([results[0]], [results[1]], 1e-10)


def test_a_tensor_given_twice_is_updated_twice() -> None:
    (p, g), stock = tensors([(3, 4), (3, 4)]), []
    options = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "lr": 0.1}
    stock = [p.clone()] * 2
    functional.sgd([p, p], [g, 2 * g], [], **options)
    theirs("sgd")(stock, [g, 2 * g], [], foreach=False, **options)
    assert_agree([[p]], [stock[:1]])


def test_a_call_imports_no_compiler_and_breaks_a_graph_that_it_is_in() -> None:
    options = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "lr": 0.5}
    program = f"""
import sys, torch
from compiled_optim.functional import sgd
p = torch.ones(2)
sgd([p], [p], [], **{options})
assert "torch._dynamo" not in sys.modules and p.tolist() == [0.5, 0.5]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    p = torch.ones(2)

    @torch.compile(backend="eager")
    def update(g: Tensor) -> Tensor:
        doubled = g * 2
        functional.sgd([p], [doubled], [], **options)
        return doubled + 1

    for value in (0.0, -1.0):
        assert update(torch.ones(2)).tolist() == [3.0, 3.0]
        assert p.tolist() == [value, value]


def test_what_is_refused_changes_nothing() -> None:
    (cls,) = [c for c in CLASSES if c.__name__ == "Adam"]
    mine, chosen = call(cls, {})
    before = copied(mine)
    scale = torch.ones(())
    wrong: list[tuple[dict[int, Any], dict[str, Any], type[Exception], str]] = [
        ({1: mine[1][:2]}, {}, ValueError, "grads must be as long as params, got 2 beside 3"),
        ({3: []}, {}, ValueError, "exp_avg_sqs must be as long as params, got 0"),
        ({5: [1, 2, 3]}, {}, RuntimeError, "state_steps must be tensors of one element, got 1"),
        ({}, {"amsgrad": True}, ValueError, "max_exp_avg_sqs must be as long as params"),
        ({}, {"grad_scale": scale}, AssertionError, "grad_scale and found_inf must be None without fused=True"),
        ({}, {"foreach": True, "differentiable": True}, RuntimeError, "foreach=True records no graph"),
        ({}, {"fused": True, "differentiable": True}, RuntimeError, "fused=True records no graph"),
        ({}, {"capturable": True}, RuntimeError, "capturable=True needs parameters on a device with graphs"),
        ({0: [torch.nn.Parameter(p) for p in mine[0]]}, {}, RuntimeError, r"params\[0\] is a leaf that requires grad"),
        ({1: [g[:1] for g in mine[1]]}, {}, RuntimeError, "gradient of the parameter of shape"),
        ({}, {"lr": "fast"}, TypeError, "lr must be at least 0, got 'fast'"),
        ({1: [mine[1][0], None, mine[1][2]]}, {}, TypeError, "grads must be tensors, got None"),
    ]
    for lists, options, kind, message in wrong:
        with pytest.raises(kind, match=message):
            functional.adam(*[lists.get(i, values) for i, values in enumerate(mine)], **{**chosen, **options})
        assert_agree(mine, before, 0)
    with pytest.raises(TypeError, match=r"missing a required.*argument"):
        functional.adam(*mine)  # type: ignore[call-arg]
