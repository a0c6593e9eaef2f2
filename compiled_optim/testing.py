"""A test kit: `check` tests what the engine promises of every optimizer, `assert_compiles` that a loop compiles once.

In a test module::

    from compiled_optim.testing import assert_compiles, check

    def test_lion():
        check(Lion)

    def test_a_schedule_compiles_nothing():
        train(steps=2)
        with assert_compiles(0):
            train(steps=100)
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.kernels.registry import cache_info
from compiled_optim._engine.torch_private import dynamo
from compiled_optim.declare import Compiled, Flag, Number
from compiled_optim.optimizer import Optimizer
from compiled_optim.report import explain

_SHAPES: list[tuple[int, ...]] = [(3, 5), (7,), (33, 2)]
_RTOL = 1e-11


def check(cls: type[Optimizer], *option_sets: dict[str, Any], foreach: bool = True) -> None:
    """Checks an optimizer class in float64, for each of the option sets.

    - every execution gives the parameters and the state that ``foreach=False`` gives, also with missing gradients;
    - a checkpoint, saved and loaded with ``weights_only=True``, continues in either execution as if uninterrupted;
    - one kernel at most is compiled, in the first step, and none when hyperparameters change or a param group is added;
    - transposed, channels-last, empty, 0-d and complex parameters are updated as contiguous real ones;
    - a hyperparameter out of its declared range is refused by name.

    Args:
        option_sets: options of the constructor; by default none, and every switch on at once.
        foreach: whether to compile the "foreach" lowering too, which takes some seconds.

    Raises:
        AssertionError: naming what does not hold.
    """
    _check_ranges(cls)
    for options in option_sets or ({}, _every_switch(cls)):
        in_lists = foreach and cls.accepts_dense and not cls.matrices_only
        lowerings: list[Compiled] = [True, "foreach"] if in_lists else [True]
        for compiled in (False, *lowerings):
            with _told(f"{cls.__name__}({options}, compiled={compiled!r})"):
                _check_values(cls, options, compiled)
                _check_checkpoint(cls, options, compiled)
        if cls.elementwise:
            with _told(f"{cls.__name__}({options}, compiled=True)"):
                _check_kernels(cls, options)
                if cls.accepts_dense:
                    _check_layouts(cls, options)


@dataclass
class Compilations:
    """What a block of `assert_compiles` compiled; 0 until the block has ended."""

    graphs: int = 0
    kernels: int = 0


@contextmanager
def assert_compiles(
    n: int | None = None, *, graphs: int | None = None, kernels: int | None = None
) -> Iterator[Compilations]:
    """Checks how much a block compiles: ``with assert_compiles(0): train()``.

    Yields an object whose ``graphs`` and ``kernels`` are known after the block, for checks such as "one at most". The
    block may call ``torch.compiler.reset``, but not `cache_clear`, which sets the count of kernels back.

    Args:
        n: how many graphs and kernels together.
        graphs: how many graphs ``torch.compile`` makes: one between two graph breaks, and again in each recompilation.
        kernels: how many kernels of this package are new to the process, be they compiled or found on disk.

    Raises:
        AssertionError: if it was another number, with both counts. What the block itself raises passes unchanged.
    """
    found = Compilations()
    graphs_before, kernels_before = dynamo.graphs_compiled(), cache_info().kernels
    yield found
    found.graphs, found.kernels = dynamo.graphs_compiled() - graphs_before, cache_info().kernels - kernels_before
    both = f"found {found.graphs} graphs and {found.kernels} kernels"
    assert n in (None, found.graphs + found.kernels), f"{n} graphs and kernels together expected, {both}"
    assert graphs in (None, found.graphs), f"{graphs} graphs expected, {both}"
    assert kernels in (None, found.kernels), f"{kernels} kernels expected, {both}"


@contextmanager
def _told(case: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{case}: {error}") from error


def _every_switch(cls: type[Optimizer]) -> dict[str, Any]:
    switches = {k: v for k, v in cls.rule.declaration.options.items() if v.switch and v.init}
    options: dict[str, Any] = {k: not v.default if isinstance(v, Flag) else 0.1 for k, v in switches.items()}
    for left_out in (None, *options):  # switches may exclude each other
        chosen = {k: v for k, v in options.items() if k != left_out}
        try:
            cls(_parameters(cls), **chosen)
        except ValueError:
            continue
        return chosen
    return {}


def _parameters(cls: type[Optimizer], shapes: Sequence[tuple[int, ...]] = _SHAPES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [s for s in shapes if len(s) == 2 or not cls.matrices_only]
    return [torch.nn.Parameter(torch.randn(s, dtype=torch.float64, generator=generator)) for s in shapes]


def _give_gradients(cls: type[Optimizer], params: Sequence[Tensor], step: int) -> None:
    """The same ones for the same step; now and then one is missing."""
    generator = torch.Generator().manual_seed(step + 1)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        if not cls.accepts_dense:
            rows = torch.randint(0, p.shape[0], (1, 4), generator=generator)
            values = torch.randn((4, *p.shape[1:]), dtype=p.dtype, generator=generator)
            grad = torch.sparse_coo_tensor(rows, values, p.shape, check_invariants=True)
        p.grad = None if (step + i) % 5 == 4 else grad


def _train(optimizer: Optimizer, steps: range) -> list[Tensor]:
    """Steps; returns parameters and state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        _give_gradients(type(optimizer), params, step)
        optimizer.step()
    state = [v for p in params for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
    return [t.detach() for t in (*params, *state)]


def _assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    assert len(actual) == len(expected), f"{what}: {len(actual)} tensors of state instead of {len(expected)}"
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=_RTOL, atol=_RTOL, msg=lambda text: f"{what}: {text}", equal_nan=True)


def _reference(cls: type[Optimizer], options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "foreach": False} if "foreach" in cls.rule.declaration.options else options


def _check_values(cls: type[Optimizer], options: dict[str, Any], compiled: Compiled) -> None:
    expected = _train(cls(_parameters(cls), **_reference(cls, options)), range(8))
    optimizer = cls(_parameters(cls), **options, compiled=compiled)
    _assert_equal(_train(optimizer, range(8)), expected, "values")
    executions = {row.execution for row in explain(optimizer)}
    wanted = compiled if isinstance(compiled, str) else "multi_tensor" if compiled else "eager"
    as_graph = compiled is True and not cls.elementwise and executions == {"foreach"}  # a rule that stages cannot have
    assert executions == {wanted} or as_graph, f"it ran as {executions}, not as {wanted}: {explain(optimizer)}"


def _check_checkpoint(cls: type[Optimizer], options: dict[str, Any], compiled: Compiled) -> None:
    expected = _train(cls(_parameters(cls), **_reference(cls, options)), range(8))
    first = cls(_parameters(cls), **options, compiled=compiled)
    _train(first, range(4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = [torch.nn.Parameter(p.detach().clone()) for group in first.param_groups for p in group["params"]]
    second = cls(params, compiled=not compiled)
    second.load_state_dict(saved)
    _assert_equal(_train(second, range(4, 8)), expected, "values after a checkpoint")


def _check_kernels(cls: type[Optimizer], options: dict[str, Any]) -> None:
    optimizer = cls(_parameters(cls), **options, compiled=True)
    with assert_compiles() as first:
        _train(optimizer, range(2))
    assert first.kernels <= 1, f"the first step compiled {first.kernels} kernels"
    for name, field in cls.rule.declaration.options.items():
        value = optimizer.param_groups[0][name]
        if isinstance(field, Number) and (value or not field.switch):
            changed: Any = tuple(v * 0.9 for v in value) if isinstance(value, tuple) else value * 0.9
            optimizer.param_groups[0][name] = changed
            with _told(f"{name} going from {value!r} to {changed!r}"), assert_compiles(0):
                _train(optimizer, range(2, 4))
            optimizer.param_groups[0][name] = value
    optimizer.add_param_group({"params": _parameters(cls, [(4, 3)], seed=1)})
    with _told("add_param_group"), assert_compiles(0):
        _train(optimizer, range(4, 6))
    with _told("a second optimizer"), assert_compiles(0):
        _train(cls(_parameters(cls, [(2, 2)] * 9), **options, compiled=True), range(2))


def _check_layouts(cls: type[Optimizer], options: dict[str, Any]) -> None:
    wide = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layouts = {
        "transposed": wide.t(),
        "channels last": wide.view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "empty": wide[:0],
        "0-d": wide[0, 0],
        "complex": torch.view_as_complex(wide.view(6, 2, 2)),
    }
    for name, value in layouts.items():
        real = torch.view_as_real(value) if value.is_complex() else value
        laid, plain = (torch.nn.Parameter(v.clone()) for v in (value, real.contiguous()))
        mine, reference = cls([laid], **options, compiled=True), cls([plain], **_reference(cls, options))
        for step in range(3):
            grad = torch.randn(plain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            plain.grad, laid.grad = grad, torch.view_as_complex(grad.clone()) if laid.is_complex() else grad.clone()
            mine.step()
            reference.step()
        result = torch.view_as_real(laid.detach()) if laid.is_complex() else laid.detach()
        _assert_equal([result], [plain.detach()], f"a parameter that is {name}")


def _check_ranges(cls: type[Optimizer]) -> None:
    for name, field in cls.rule.declaration.options.items():
        if not isinstance(field, Number):
            continue
        beyond = [field.low - 1] if field.low is not None else []
        beyond += [b for b in (field.above, field.below) if b is not None]
        beyond += [field.high + 1] if field.high is not None else []
        for value in beyond:
            options: dict[str, Any] = {name: (value, *field.default[1:]) if isinstance(field.default, tuple) else value}
            message = ""
            try:
                cls(_parameters(cls), **options)
            except ValueError as error:
                message = str(error)
            assert message, f"{cls.__name__}: {options} was not refused; {name} must be {field.range}"
            assert name.removesuffix("s") in message, f"{cls.__name__}: the error does not name {name}: {message}"
