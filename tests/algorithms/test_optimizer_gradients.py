"""Gradients of steps that are differentiable, and gradients of another dtype or layout than their parameter's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_torch import assert_same, state_of
from cases import CLASSES, named, oracle, rich_options, with_all_numbers
from torch import Tensor

from compiled_optim import SGD, Adam, AdamW, Optimizer, explain

both = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


# ---- differentiable steps

DIFFERENTIABLE = [cls for cls in CLASSES if "differentiable" in cls.rule.declaration.options]
EACH = [(cls, o) for cls in DIFFERENTIABLE for o in ({}, with_all_numbers(cls, rich_options(cls)))]
each = pytest.mark.parametrize(("cls", "options"), EACH, ids=[f"{c.__name__}-{named(o)}" for c, o in EACH])
each_class = pytest.mark.parametrize("cls", DIFFERENTIABLE, ids=lambda cls: cls.__name__)


@pytest.fixture
def _float64() -> None:
    """Step counts, and what is carried beside them, have the default dtype; the fixture of all tests sets it back."""
    torch.set_default_dtype(torch.float64)


def state_values(optimizer: Optimizer) -> dict[str, Tensor]:
    """State of any step but the first, between which and its bounds no ``maximum`` and no root has its kink."""
    (p,), (choice,) = optimizer.param_groups[0]["params"], optimizer._work().read()
    carried = {name: torch.rand(()) / 5 + 0.5 for name in optimizer.rule.declaration.carried}
    return {
        **carried,
        **{
            name: torch.rand(p.shape) / 5 + 0.5
            for name in optimizer.rule.declaration.kept(choice.switches, torch.float32)
        },
    }


def two_steps(cls: Any, options: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Parameter and state after two steps from the tenth, as a function of the inputs."""
    p = p.clone()
    optimizer = cls([p], **options)
    count = {"step": torch.tensor(10.0)} if optimizer.rule.declaration.counts else {}
    optimizer.state[p] = {**count, **{name: t.clone() for name, t in state.items()}}
    for scale in (1, -2):
        p.grad = g * scale
        optimizer.step()
    return p, *(optimizer.state[p][name] for name in state)


@pytest.mark.usefixtures("_float64")
@each
def test_gradcheck(cls: Any, options: dict[str, Any]) -> None:
    """With respect to the parameter, its gradient, all state, and the learning rate."""
    p, g = torch.randn(2, 3), torch.tensor([[-1.5, -0.7, -0.2], [0.3, 0.8, 1.7]])
    state = state_values(cls([p], differentiable=True, **options))
    lr = torch.tensor(options.get("lr", 0.05))

    def steps(p: Tensor, g: Tensor, lr: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        made = dict(zip(state, values, strict=True))
        results = two_steps(cls, {**options, "lr": lr, "differentiable": True}, p, g, made)
        # gradcheck passes over a result that requires no gradient; one whose graph was cut must not be passed over
        nothing = sum((t.sum() for t in (p, g, lr, *values)), start=torch.zeros(())) * 0
        return tuple(t + nothing for t in results)

    inputs = [t.requires_grad_() for t in (p, g, lr, *state.values())]
    assert torch.autograd.gradcheck(steps, inputs)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(("cls", "option"), [(SGD, "weight_decay"), (Adam, "betas"), (AdamW, "betas")])
def test_gradcheck_of_other_tensor_options(cls: Any, option: str) -> None:
    p, g = torch.randn(2, 3), torch.randn(2, 3)
    state = state_values(cls([p], differentiable=True))

    def steps(*values: Tensor) -> tuple[Tensor, ...]:
        options = {option: values if len(values) > 1 else values[0], "lr": 0.05, "differentiable": True}
        return two_steps(cls, options, p, g, state)

    values = (0.8, 0.9) if option == "betas" else (0.3,)
    assert torch.autograd.gradcheck(steps, [torch.tensor(v, requires_grad=True) for v in values])


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@each
def test_values_are_those_of_a_plain_step(cls: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    start = [torch.randn(shape, dtype=dtype) for shape in [(), (3, 5)]]
    runs = [
        (cls(params := [t.clone() for t in start], differentiable=True, **options), params),
        (cls(params := [torch.nn.Parameter(t.clone()) for t in start], **options), params),
    ]
    for i in range(8):  # RAdam rectifies from the sixth
        gradients = [None if i == j else torch.randn_like(t) for j, t in enumerate(start)]
        for optimizer, params in runs:
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
            optimizer.step()
        for p, q in zip(*(params for _, params in runs), strict=True):
            assert_same(p, q)
            mine, plain = state_of(runs[0][0], p), state_of(runs[1][0], q)
            assert mine.keys() == plain.keys()
            for name, value in plain.items():
                assert_same(mine[name], value, what=name)
                assert mine[name].dtype == value.dtype


def unrolled(cls: Any, start: Tensor, lr: Any, **options: Any) -> Tensor:
    """A loss after three steps, as a function of the first parameters and the learning rate."""
    target = torch.linspace(-1, 1, start.numel(), dtype=start.dtype).view_as(start)
    p = start.clone()
    optimizer = cls([p], lr=lr, differentiable=True, **options)
    for _ in range(3):
        (p.grad,) = torch.autograd.grad((p - target).sin().square().sum(), p, create_graph=True)
        optimizer.step()
    return ((p - target) ** 2).sum()


# torch.optim overwrites what their graphs saved for the backward pass
NOT_IN_TORCH = {"Adamax", "Rprop"}
# elsewhere it takes no lr that requires a gradient, or gives it none
LR_IN_TORCH = {"SGD", "Adam", "AdamW", "RAdam"}


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("options", [{}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("cls", [c for c in DIFFERENTIABLE if c.__name__ not in NOT_IN_TORCH], ids=lambda c: c.__name__)
def test_unrolled_steps_have_the_gradients_of_torch(cls: type[Optimizer], options: dict[str, Any]) -> None:
    start = torch.randn(3, 4)
    results = []
    for made in (cls, oracle(cls)):
        inputs = [start.clone().requires_grad_()]
        lr: Any = 0.05
        if cls.__name__ in LR_IN_TORCH:
            inputs.append(lr := torch.tensor(0.05, requires_grad=True))
        loss = unrolled(made, inputs[0], lr, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().min() > 0 for gradient in results[0][1:])


@pytest.mark.parametrize("compiled", [True, "multi_tensor", "foreach"])
@each_class
def test_a_compiled_step_cannot_be_differentiable(cls: type[Optimizer], compiled: bool | str) -> None:
    with pytest.raises(RuntimeError, match=f"compiled={compiled!r} does not support differentiable=True"):
        cls([torch.ones(2)], compiled=compiled, differentiable=True)


@pytest.mark.parametrize(
    "cls", [c for c in DIFFERENTIABLE if "fused" in c.rule.declaration.options], ids=lambda c: c.__name__
)
def test_a_fused_step_cannot_be_differentiable(cls: type[Optimizer]) -> None:
    with pytest.raises(RuntimeError, match=r"fused.* does not support .*differentiable"):
        oracle(cls)([torch.ones(2)], fused=True, differentiable=True)
    with pytest.raises(RuntimeError, match="fused=True does not support differentiable=True"):
        cls([torch.ones(2)], fused=True, differentiable=True)


# ---- a gradient of another dtype


@both
@pytest.mark.parametrize("cls", [SGD, AdamW])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_grad_dtype(cls: type[Optimizer], dtype: torch.dtype, grad_dtype: torch.dtype, compiled: bool) -> None:
    values = torch.randn(2, 5, dtype=dtype)
    ours, stock = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    plain = torch.nn.Parameter(values.clone())
    ours.grad_dtype = grad_dtype
    mine, theirs = cls([ours, plain], lr=0.1, compiled=compiled), oracle(cls)([stock], lr=0.1)
    for _ in range(3):
        ours.grad = torch.randn(2, 5, dtype=grad_dtype)
        stock.grad, plain.grad = ours.grad.to(dtype), ours.grad.to(dtype)
        kept, version = ours.grad, ours.grad._version
        mine.step()
        theirs.step()
        assert ours.grad is kept
        assert kept._version == version
        assert ours.dtype is dtype
        tolerance = 1e-12 if dtype is torch.float64 else 2e-6
        torch.testing.assert_close(ours.detach(), stock.detach(), rtol=0, atol=tolerance)
        assert torch.equal(ours, plain)
    assert {row.execution for row in explain(mine)} == {"multi_tensor" if compiled else "eager"}
    assert all(t.dtype is dtype for k, t in mine.state.get(ours, {}).items() if k != "step")


@both
def test_the_dtype_of_a_gradient_may_change_between_steps(compiled: bool) -> None:
    values = torch.randn(2, 5, dtype=torch.float64)
    ours, stock = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    mine, theirs = AdamW([ours], lr=0.1, compiled=compiled), torch.optim.AdamW([stock], lr=0.1)
    for dtype in (torch.float64, torch.float32, torch.float64, torch.bfloat16):
        ours.grad, ours.grad_dtype = None, dtype
        ours.grad = torch.randn(2, 5).to(dtype)
        stock.grad = ours.grad.double()
        mine.step()
        theirs.step()
        torch.testing.assert_close(ours.detach(), stock.detach(), rtol=0, atol=1e-12)
    if compiled:
        assert explain(mine).rebuilt == ["the first step", *["a gradient changed its layout or dtype"] * 3]


NARROW = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.float16)]
WAYS = [(*pair, way) for pair in NARROW for way in (False, True)]
WAYS += [(*NARROW[0], "foreach")]


def narrow(dtype: torch.dtype, grad_dtype: torch.dtype | None, shape: tuple[int, ...] = (40, 33)) -> Any:
    p = torch.nn.Parameter(torch.randn(shape).to(dtype))
    p.grad_dtype = grad_dtype
    return p


@pytest.mark.parametrize(("dtype", "grad_dtype", "compiled"), WAYS, ids=str)
def test_a_wider_gradient_is_not_rounded(dtype: torch.dtype, grad_dtype: torch.dtype, compiled: Any) -> None:
    ours = narrow(dtype, grad_dtype)
    wide = torch.nn.Parameter(ours.detach().float())
    mine, theirs = SGD([ours], lr=2.0**-3, compiled=compiled), torch.optim.SGD([wide], lr=2.0**-3)
    for _ in range(3):
        ours.grad = torch.randn(40, 33).to(grad_dtype)
        assert grad_dtype is torch.float16 or not torch.equal(ours.grad.to(dtype).float(), ours.grad)
        wide.grad = ours.grad.float()
        mine.step()
        theirs.step()
        assert torch.equal(ours, wide.to(dtype))
        wide.data.copy_(ours)


def test_gradients_of_any_real_dtype_go_into_launches_as_they_are() -> None:
    """Nothing is copied, and each pair of dtypes is one launch."""
    given = [*NARROW, *NARROW, (torch.float32, torch.bfloat16), (torch.complex64, torch.complex128)]
    params = [narrow(dtype, grad_dtype) for dtype, grad_dtype in given]
    optimizer = SGD(params, lr=0.1, compiled=True)

    def give() -> None:
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.grad_dtype)

    for _ in range(2):
        give()
        optimizer.step()
    give()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert {e.key for e in profile.key_averages() if e.key.startswith("aten::")} == set()
    rows = {row.kernel: row.tensors for row in explain(optimizer)}
    assert {row.execution for row in explain(optimizer)} == {"multi_tensor"}
    assert rows["SGD()[bfloat16, float32 gradients]"] == 2
    assert len(rows) == 5


def test_other_gradients_are_copied() -> None:
    """A real gradient of a complex parameter, and integers."""
    given = [(torch.complex64, torch.float32), (torch.float32, torch.int32)]
    params = [narrow(dtype, grad_dtype, (3,)) for dtype, grad_dtype in given]
    before = [p.detach().clone() for p in params]
    optimizer = SGD(params, lr=0.5, compiled=True)
    for p in params:
        p.grad = torch.arange(3).to(p.grad_dtype)
    optimizer.step()
    assert {row.execution for row in explain(optimizer)} == {"multi_tensor"}
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * torch.arange(3))


@both
def test_a_plan_outlives_the_absence_of_a_gradient(compiled: bool) -> None:
    """Which dtype the missing gradient will have is what its parameter says."""
    params = [narrow(torch.bfloat16, torch.float32) for _ in range(3)]
    optimizer = AdamW(params, compiled=compiled)
    for missing in ((), (1,), (0, 1), ()):
        for i, p in enumerate(params):
            p.grad = None if i in missing else torch.randn(40, 33)
        optimizer.step()
    params[1].grad = None
    optimizer.state[params[0]] = dict(reversed(optimizer.state[params[0]].items()))  # needs another plan
    optimizer.step()
    params[1].grad = torch.randn(40, 33)
    optimizer.step()
    rebuilt = explain(optimizer).rebuilt
    assert rebuilt == (["the first step", "the optimizer's state changed"] if compiled else [])


@both
def test_a_gradient_laid_out_otherwise(compiled: bool) -> None:
    values = torch.randn(4, 5, dtype=torch.float64)
    ours, stock = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    mine, theirs = AdamW([ours], lr=0.1, compiled=compiled), torch.optim.AdamW([stock], lr=0.1)
    base = torch.randn(5, 4, dtype=torch.float64)
    for grad in (base.t(), base.t().contiguous(), torch.randn(4, 1, dtype=torch.float64).expand(4, 5), base.t()):
        ours.grad, stock.grad = grad, grad.contiguous()
        mine.step()
        theirs.step()
        torch.testing.assert_close(ours.detach(), stock.detach(), rtol=0, atol=1e-12)
