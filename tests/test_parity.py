"""Every option set of every class against torch.optim."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import ALL, CLASSES, IDS, named, oracle, rich_options, switch_sets, values_for
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import SHAPES, Lockstep, parameter, state_of, tensors
from torch import Tensor

Options = dict[str, Any]
EXECUTIONS: list[bool | str] = [False, True]
execution = pytest.mark.parametrize("compiled", EXECUTIONS, ids=["eager", "compiled"])
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
FEW = [(cls, options) for cls in CLASSES for options in ({}, rich_options(cls))]
few = pytest.mark.parametrize(("cls", "options"), FEW, ids=[f"{c.__name__}-{named(o)}" for c, o in FEW])


def lockstep(
    cls: Any, options: Options, initial: list[Tensor], compiled: bool | str = True, theirs: Options | None = None
) -> Lockstep:
    reference = {**options, **(theirs or {})}
    return Lockstep(
        lambda params: oracle(cls)(params, **reference),
        lambda params: cls(params, **options, compiled=compiled),
        initial,
    )


@execution
@pytest.mark.parametrize(("cls", "options"), ALL, ids=IDS)
def test_float64(cls: Any, options: Options, compiled: bool) -> None:
    run = lockstep(cls, options, tensors(), compiled)
    for _ in range(10):
        run.step()
        run.compare()


@few
def test_float64_foreach_lowering(cls: Any, options: Options) -> None:
    run = lockstep(cls, options, tensors([(), (7,), (3, 5)]), "foreach")
    run.step(10)
    run.compare()


def trajectory(build: Any, initial: list[Tensor], gradients: list[list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Parameters and state after steps in ``dtype``, in float64 and each as one vector."""
    params = [parameter(t.to(dtype)) for t in initial]
    optimizer = build(params)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.to(dtype)
        optimizer.step()
    state = [state_of(optimizer, p) for p in params]
    columns = [params, *([s[name] for s in state] for name in state[0] if name != "step")]
    return [torch.cat([t.detach().double().flatten() for t in column]) for column in columns]


def rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


@execution
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@few
def test_no_less_exact_than_fused(cls: Any, options: Options, dtype: torch.dtype, compiled: bool) -> None:
    shapes = [(4000,), (63, 65), (1,), ()]
    initial = [torch.randn(shape).to(dtype) for shape in shapes]
    gradients = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(10)]
    has_fused = "fused" in inspect.signature(oracle(cls)).parameters
    fused = {"fused": True} if has_fused else {}
    truth = trajectory(lambda params: oracle(cls)(params, **options), initial, gradients, torch.float64)
    theirs = trajectory(lambda params: oracle(cls)(params, **options, **fused), initial, gradients, dtype)
    ours = trajectory(lambda params: cls(params, **options, compiled=compiled), initial, gradients, dtype)
    for expected, reference, actual in zip(truth, theirs, ours, strict=True):
        # the floor: what rounding the truth itself once would cost
        floor = rms(expected.to(dtype).double() - expected)
        assert rms(actual - expected) <= 1.5 * max(rms(reference - expected), floor)


@execution
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.complex64, 2e-5), (torch.complex128, 1e-12)], ids=str)
@few
def test_complex(cls: Any, options: Options, dtype: torch.dtype, rtol: float, compiled: bool) -> None:
    run = lockstep(cls, options, tensors(dtype=dtype), compiled)
    run.step(10)
    run.compare(rtol)


@execution
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-element"])
@each_class
def test_tensor_lr(cls: Any, shape: tuple[int, ...], compiled: bool) -> None:
    lr = torch.full(shape, 0.01, dtype=torch.float64)
    run = Lockstep(
        lambda params: oracle(cls)(params, lr=lr.clone(), foreach=False),
        lambda params: cls(params, lr=lr.clone(), compiled=compiled),
        tensors(),
    )
    for value in (0.01, 0.02, 0.0):
        run.both(lambda optimizer, _, value=value: optimizer.param_groups[0]["lr"].fill_(value))
        run.step(2)
        run.compare()
    assert isinstance(run.ours.param_groups[0]["lr"], Tensor)


TENSOR_OPTIONS = [
    *(
        (cls, {"lr": torch.tensor(0.01, dtype=torch.float64), "betas": tuple(torch.tensor(b) for b in (0.8, 0.9))})
        for cls in CLASSES
        if cls.__name__ in ("Adam", "AdamW")  # the others of torch.optim take no tensors
    ),
    *((cls, {"weight_decay": torch.tensor(0.3, dtype=torch.float64)}) for cls in CLASSES if cls.__name__ == "SGD"),
]


@execution
@pytest.mark.parametrize(("cls", "options"), TENSOR_OPTIONS, ids=lambda v: getattr(v, "__name__", "options"))
def test_tensor_options(cls: Any, options: Options, compiled: bool) -> None:
    run = lockstep(cls, options, tensors(), compiled, theirs={"foreach": False})
    run.step(5)
    run.compare(1e-6 if "betas" in options else 1e-12)  # torch computes with float32 betas in float32


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
    run.compare()  # takes NaN for equal to NaN and inf to inf
    run.step(2)
    run.compare()


@execution
@few
def test_zero_lr_and_zero_gradients(cls: Any, options: Options, compiled: bool) -> None:
    run = lockstep(cls, {**options, "lr": 0.0}, tensors(), compiled)
    before = [p.detach().clone() for p in run.params[1]]
    for _ in range(3):
        run.give([torch.zeros_like(p) for p in run.params[0]])
        run.step_as_is()
        run.compare()
    torch.testing.assert_close([p.detach() for p in run.params[1]], before, rtol=0, atol=0)


@execution
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_class
def test_denormals(cls: Any, dtype: torch.dtype, compiled: bool) -> None:
    """Neither flushed to zero on the way in nor on the way out."""
    smallest = torch.tensor(0, dtype=dtype).nextafter(torch.tensor(1, dtype=dtype)).item()
    initial = [torch.arange(-70, 70, dtype=dtype) * smallest]
    scale = {"lr": 0.5, "eps": 0.5, "betas": (0.5, 0.5)}  # an update is about as large as its gradient
    run = lockstep(cls, {k: v for k, v in scale.items() if k in cls.declaration.options}, initial, compiled)
    for _ in range(2):
        run.give([torch.arange(140, dtype=dtype) * 2 * smallest])
        run.step_as_is()
    expected, actual = run.params[0][0].detach(), run.params[1][0].detach()
    if cls.__name__ in ("SGD", "Adam", "AdamW"):  # the others divide by the gradient's size
        assert expected.abs().max() < torch.finfo(dtype).tiny
        assert expected.count_nonzero() > 100
    torch.testing.assert_close(actual, expected, rtol=0, atol=smallest * 4)


@execution
@pytest.mark.parametrize("cls", [cls for cls in CLASSES if "eps" in cls.declaration.options], ids=lambda c: c.__name__)
def test_eps_zero(cls: Any, compiled: bool) -> None:
    run = lockstep(cls, {"eps": 0.0}, tensors(), compiled)
    run.step(3)
    run.compare()
    gradient = [torch.randn_like(p) for p in run.params[0]]
    run = lockstep(cls, {"eps": 0.0}, tensors(), compiled)
    gradient[-1][3] = 0  # 0 / 0 where nothing was seen yet
    run.give(gradient)
    run.step_as_is()
    run.compare()


@each_class
def test_any_values_and_shapes(cls: Any) -> None:
    """Values compile nothing; the switches do, so they are drawn from those that other tests use."""

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(
        switches=st.sampled_from(switch_sets(cls)),
        data=st.data(),
        shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5),
        seed=st.integers(0, 1000),
    )
    def check(switches: Options, data: Any, shapes: list[tuple[int, ...]], seed: int) -> None:
        options = data.draw(values_for(cls, switches), label="options")
        torch.manual_seed(seed)
        run = lockstep(cls, options, tensors([*shapes, *SHAPES[:1]]))
        run.step(4)
        run.compare(1e-11)

    check()
