"""Every option set of every class against torch.optim."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from beside_torch import SHAPES, Lockstep, tensors
from cases import (
    ALL,
    CLASSES,
    FEW,
    NARROW,
    accepted,
    filled,
    fitted,
    named,
    numbers_of,
    oracle,
    rich_options,
    sample,
    switch_sets,
    tolerance,
)
from drawn import values_for
from exactness import assert_no_less_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

Options = dict[str, Any]
execution = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def cases(pairs: list[tuple[Any, Options]]) -> Any:
    return pytest.mark.parametrize(("cls", "options"), pairs, ids=[f"{c.__name__}-{named(o)}" for c, o in pairs])


few = cases(FEW)


def lockstep(
    cls: Any, options: Options, initial: list[Tensor], compiled: bool | str = True, theirs: Options | None = None
) -> Lockstep:
    reference = {**options, **(theirs or {})}
    return Lockstep(
        lambda params: oracle(cls)(params, **reference),
        lambda params: cls(params, **options, compiled=compiled),
        [fitted(cls, t) for t in initial],
    )


@execution
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@cases(ALL)
def test_float64(cls: Any, options: Options, default: torch.dtype, compiled: bool) -> None:
    torch.set_default_dtype(default)  # of it are the step count and what is carried
    run = lockstep(cls, options, tensors(), compiled)
    for _ in range(10):
        run.step()
        run.compare(tolerance(cls))


# sparse gradients are applied eagerly there, and batched products have no graph
@cases([(cls, rich_options(cls)) for cls in CLASSES if cls.accepts_dense and not cls.matrices_only])
def test_float64_foreach_lowering(cls: Any, options: Options) -> None:
    run = lockstep(cls, options, tensors([(), (7,), (3, 5)]), "foreach")
    run.step(10)
    run.compare(tolerance(cls))


@execution
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@cases(NARROW)
def test_no_less_exact_than_torch(cls: Any, options: Options, dtype: torch.dtype, compiled: bool) -> None:
    assert_no_less_exact(cls, options, dtype, compiled=compiled)


def complex_run(cls: Any, options: Options, dtype: torch.dtype, compiled: bool) -> Lockstep:
    run = lockstep(cls, options, tensors(dtype=dtype), compiled)
    run.step(10)
    return run


@execution
@cases([(cls, options) for cls, options in FEW if accepted(cls, options, torch.complex128)])
def test_complex128(cls: Any, options: Options, compiled: bool) -> None:
    complex_run(cls, options, torch.complex128, compiled).compare(tolerance(cls))


@execution
@cases([(cls, options) for cls, options in NARROW if accepted(cls, options, torch.complex64)])
def test_complex64(cls: Any, options: Options, compiled: bool) -> None:
    complex_run(cls, options, torch.complex64, compiled).compare(2e-5)


@execution
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-element"])
@each_class
def test_tensor_lr(cls: Any, shape: tuple[int, ...], compiled: bool) -> None:
    lr = torch.full(shape, 0.01, dtype=torch.float64)
    # its list code takes no tensor
    theirs = {"foreach": False} if "foreach" in cls.rule.declaration.options else {}
    run = Lockstep(
        lambda params: oracle(cls)(params, lr=lr.clone(), **theirs),
        lambda params: cls(params, lr=lr.clone(), compiled=compiled),
        [fitted(cls, t) for t in tensors()],
    )
    for value in (0.01, 0.02, 0.0):
        run.both(lambda optimizer, _, value=value: optimizer.param_groups[0]["lr"].fill_(value))
        run.step(2)
        run.compare(tolerance(cls))
    assert isinstance(run.ours.param_groups[0]["lr"], Tensor)


def tensor_options(cls: Any) -> Options:
    """The options for which torch's signature allows tensors, but for ``lr`` alone."""
    annotated = {k: str(p.annotation) for k, p in inspect.signature(oracle(cls)).parameters.items()}
    names = [k for k in cls.rule.declaration.options if "Tensor" in annotated.get(k, "")]
    values = {k: sample(k, cls.rule.declaration.options[k]) for k in names}
    tensor = partial(torch.tensor, dtype=torch.float64)
    return {
        k: tuple(map(tensor, v)) if isinstance(v, tuple) else tensor(v) for k, v in values.items() if len(names) > 1
    }


@execution
@pytest.mark.parametrize("cls", list(filter(tensor_options, CLASSES)), ids=lambda cls: cls.__name__)
def test_tensor_options(cls: Any, compiled: bool) -> None:
    run = lockstep(cls, tensor_options(cls), tensors(), compiled, theirs={"foreach": False})
    run.step(5)
    run.compare()


@execution
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@few
def test_not_finite_gradients(cls: Any, options: Options, value: float, compiled: bool) -> None:
    run = lockstep(cls, options, tensors([(3,), (67,)]), compiled)
    run.step(2)
    gradients = tensors([(3,), (67,)])
    gradients[0][1] = gradients[1][0] = gradients[1][33] = gradients[1][66] = value
    run.give(gradients)
    run.step_as_is()
    run.compare(tolerance(cls))  # takes NaN for equal to NaN and inf to inf
    run.step(2)
    run.compare(tolerance(cls), infinite_is_nan=True)  # an order of operations makes NaN of inf, another does not


@execution
@few
def test_zero_lr_and_zero_gradients(cls: Any, options: Options, compiled: bool) -> None:
    run = lockstep(cls, options, tensors(), compiled)
    run.both(lambda optimizer, _: optimizer.param_groups[0].update(lr=0.0))  # some refuse it at construction
    before = [p.detach().clone() for p in run.params[1]]
    for _ in range(3):
        run.give([torch.zeros_like(p) for p in run.params[0]])
        run.step_as_is()
        run.compare(tolerance(cls))
    torch.testing.assert_close([p.detach() for p in run.params[1]], before, rtol=0, atol=0)


@execution
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_class
def test_denormals(cls: Any, dtype: torch.dtype, compiled: bool) -> None:
    """Neither flushed to zero on the way in nor on the way out."""
    smallest = torch.tensor(0, dtype=dtype).nextafter(torch.tensor(1, dtype=dtype)).item()
    initial = [torch.arange(-70, 70, dtype=dtype) * smallest]
    # an update is about as large as its gradient, or as large as a denormal
    halves = {k: filled(field, 0.5) for k, field in numbers_of(cls).items() if k in ("lr", "eps", "betas")}
    scale = {"step_sizes": (2 * smallest, 4 * smallest)} if "step_sizes" in numbers_of(cls) else {}
    run = lockstep(cls, {**halves, **scale}, initial, compiled)
    for _ in range(2):
        run.give([torch.arange(140, dtype=dtype) * 2 * smallest])
        run.step_as_is()
    expected, actual = run.params[0][0].detach(), run.params[1][0].detach()
    assert expected.abs().max() < torch.finfo(dtype).tiny
    assert expected.count_nonzero() > 100
    torch.testing.assert_close(actual, expected, rtol=0, atol=smallest * 4)


def zero_eps(cls: Any) -> Options:
    return {"eps": filled(numbers_of(cls)["eps"], 0.0)}


@execution
@cases([(cls, zero_eps(cls)) for cls in CLASSES if "eps" in numbers_of(cls) and accepted(cls, zero_eps(cls))])
def test_eps_zero(cls: Any, options: Options, compiled: bool) -> None:
    run = lockstep(cls, options, tensors(), compiled)
    run.step(3)
    run.compare(tolerance(cls))
    gradient = [torch.randn_like(p) for p in run.params[0]]
    run = lockstep(cls, options, tensors(), compiled)
    gradient[-1].view(-1)[3] = 0  # 0 / 0 where nothing was seen yet
    run.give(gradient)
    run.step_as_is()
    run.compare(tolerance(cls))


@each_class
def test_any_values_and_shapes(cls: Any) -> None:
    """Values compile nothing; the switches do, so they are drawn from those that other tests use."""
    least = int(not cls.elementwise)  # the mean of an empty tensor is an error in torch

    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @given(
        switches=st.sampled_from(switch_sets(cls)),
        data=st.data(),
        shapes=st.lists(st.lists(st.integers(least, 9), max_size=3).map(tuple), min_size=1, max_size=5),
        seed=st.integers(0, 1000),
    )
    def check(switches: Options, data: Any, shapes: list[tuple[int, ...]], seed: int) -> None:
        options = data.draw(values_for(cls, switches), label="options")
        torch.manual_seed(seed)
        run = lockstep(cls, options, tensors([*shapes, *SHAPES[:1]]))
        run.step(4)
        run.compare(1e-11)

    torch.set_default_dtype(torch.float64)  # or what is carried allows no such bound
    check()
