"""Steps on the device beside those of torch.optim: algorithms, switches, dtypes, memory layouts, param groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_torch import SHAPES, Lockstep, parameter, set_gradients, tensors
from cases import ELEMENTWISE, FEW_KERNELS, named, oracle, rich_options, sample, tolerance
from exactness import assert_no_less_exact
from torch import Tensor

from compiled_optim import SGD, AdamW, Optimizer, explain

pytestmark = pytest.mark.gpu

FUSED = [(cls, options) for cls, options in FEW_KERNELS if "fused" in cls.rule.declaration.options]
CAPTURABLE = [(cls, options) for cls, options in FEW_KERNELS if "capturable" in cls.rule.declaration.options]
LARGE = [(1000,), (4099,), (129, 65)]  # whole chunks, and chunks with a tail


def cases(pairs: list[tuple[Any, dict[str, Any]]]) -> Any:
    return pytest.mark.parametrize(("cls", "options"), pairs, ids=[f"{c.__name__}-{named(o)}" for c, o in pairs])


def on(device: torch.device, values: list[Tensor]) -> list[Tensor]:
    return [t.to(device) for t in values]


def assert_one_launch(optimizer: Optimizer, tensors: int | None = None) -> None:
    """And one before it, where steps are counted on the device."""
    (row,) = explain(optimizer)
    assert (row.execution, row.launches) == ("multi_tensor", 1 + ("on_device" in row.kernel))
    assert tensors is None or row.tensors == tensors


def adamw(device: torch.device, values: list[Tensor], theirs: dict[str, Any] | None = None, **options: Any) -> Lockstep:
    return Lockstep(
        lambda params: torch.optim.AdamW(params, **{**options, **(theirs or {})}),
        lambda params: AdamW(params, **options, compiled=True),
        on(device, values),
    )


@cases(FEW_KERNELS)
def test_float64(cls: Any, options: dict[str, Any], device: torch.device) -> None:
    torch.set_default_dtype(torch.float64)
    run = Lockstep(
        lambda params: oracle(cls)(params, **options),
        lambda params: cls(params, **options, compiled=True),
        on(device, tensors([*SHAPES, *LARGE])),
    )
    for missing in ((), (2, 7), (), ()):  # from the second step on, step counts differ
        run.step(missing=missing)
        run.compare(max(tolerance(cls), 1e-11))
    assert_one_launch(run.ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cases(FEW_KERNELS)
def test_no_less_exact_than_torch(cls: Any, options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    assert_no_less_exact(cls, options, dtype, device, compiled=True)


@cases([(AdamW, rich_options(AdamW)), (SGD, rich_options(SGD))])
def test_float16(cls: Any, options: dict[str, Any], device: torch.device) -> None:
    assert_no_less_exact(cls, options, torch.float16, device, compiled=True)


@cases(FUSED)
def test_equals_torch_fused(cls: Any, options: dict[str, Any], device: torch.device) -> None:
    """Step counts and hyperparameters are read on the device."""
    run = Lockstep(
        lambda params: oracle(cls)(params, **options, fused=True),
        lambda params: cls(params, **options, fused=True),
        on(device, tensors([*SHAPES, *LARGE], torch.float32)),
    )
    for missing in ((), (2, 7), ()):
        run.step(missing=missing)
        run.compare(5e-5)
    assert_one_launch(run.ours)


@cases(CAPTURABLE)
def test_capturable(cls: Any, options: dict[str, Any], device: torch.device, without_waiting: Any) -> None:
    """Nothing is read from the device; what depends on the count is in float64 there, as on the host."""
    lr = sample("lr", cls.rule.declaration.options["lr"])
    run = Lockstep(
        lambda params: oracle(cls)(params, **options, lr=lr),
        lambda params: cls(params, **options, lr=torch.tensor(lr, device=device), capturable=True, compiled=True),
        on(device, tensors([(7,), (3, 5), *LARGE], torch.float32)),
    )
    for missing in ((), (1,), (), ()):
        set_gradients(*run.params, cls=cls, missing=missing)
        with without_waiting():
            run.ours.step()
        run.optimizers[0].step()
        run.compare(5e-5)
    assert_one_launch(run.ours)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_no_step_waits_for_the_device(options: dict[str, Any], device: torch.device, without_waiting: Any) -> None:
    params = [parameter(t) for t in on(device, tensors(dtype=torch.float32))]
    optimizer = AdamW(params, **options, compiled=True)
    for missing in ((), (1,), (), ()):
        set_gradients(params, missing=missing)
        with without_waiting():
            optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    with without_waiting():
        optimizer.step()
    assert_one_launch(optimizer)


def test_bfloat16_parameters_with_float32_state(device: torch.device) -> None:
    """The moments are not rounded; those of torch, in float64, are the reference."""
    values = [t.bfloat16() for t in tensors(LARGE, torch.float32)]
    params = [parameter(t) for t in on(device, values)]
    exact = [parameter(t.double()) for t in on(device, values)]
    ours, theirs = AdamW(params, compiled=True), torch.optim.AdamW(exact)
    for p in params:
        moments = {name: torch.zeros_like(p, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        ours.state[p] = {"step": torch.tensor(0.0), **moments}
    for _ in range(3):
        for p, q in zip(params, exact, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.double()
        ours.step()
        theirs.step()
    for p, q in zip(params, exact, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            actual = ours.state[p][name]
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual.double(), theirs.state[q][name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=2e-2, atol=2e-2)
    assert_one_launch(ours)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(dtype: torch.dtype, device: torch.device) -> None:
    run = adamw(device, tensors([(3, 5), (1031,)], dtype))
    run.step(3)
    run.compare(2e-5 if dtype is torch.complex64 else 1e-11)


def test_memory_layouts(device: torch.device) -> None:
    """Transposed, channels last, empty, and tensors that begin on any element of a larger one, as in DDP's buckets."""
    bucket = torch.randn(10_000, device=device)
    values = [
        torch.randn(5, 300, device=device).t(),
        torch.randn(2, 3, 17, 19, device=device).to(memory_format=torch.channels_last),
        torch.randn(0, 4, device=device),
        torch.randn((), device=device),
    ]
    run = adamw(device, [*values, torch.randn(3001, device=device), torch.randn(4096, device=device)])
    for params in run.params:  # these two are views from now on
        own = bucket.clone()
        params[4].data, params[5].data = own[1:3002], own[3003 : 3003 + 4096]
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in run.params[0]]
        gradients[5] = torch.randn(10_000, device=device)[3 : 3 + 4096]
        run.give(gradients)
        run.step_as_is()
        run.compare(1e-5)
    assert_one_launch(run.ours, tensors=6)


def test_param_groups_are_one_launch(device: torch.device) -> None:
    def groups(params: list[Any]) -> list[dict[str, Any]]:
        return [{"params": params[:2]}, {"params": params[2:], "lr": 0.1, "betas": (0.5, 0.6)}]

    run = Lockstep(
        lambda params: torch.optim.AdamW(groups(params)),
        lambda params: AdamW(groups(params), compiled=True),
        on(device, tensors(LARGE + SHAPES, torch.float32)),
    )
    for i in range(4):
        run.both(lambda optimizer, _, i=i: optimizer.param_groups[0].update(lr=0.01 * i))
        run.step(missing=(i, i + 3))
        run.compare(1e-5)
    assert_one_launch(run.ours)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_not_finite_gradients(value: float, device: torch.device) -> None:
    run = adamw(device, tensors([(3,), (1100,)], torch.float32))
    run.step(2)
    gradients = [torch.randn_like(p) for p in run.params[0]]
    gradients[0][1] = gradients[1][0] = gradients[1][1099] = value
    run.give(gradients)
    run.step_as_is()
    run.compare(1e-5)


@pytest.mark.parametrize("cls", [cls for cls in ELEMENTWISE if cls.accepts_sparse], ids=lambda cls: cls.__name__)
def test_sparse_gradients(cls: Any, device: torch.device) -> None:
    values = on(device, [torch.randn(1000, 48), torch.randn(7, 3)])
    run = Lockstep(lambda params: oracle(cls)(params), lambda params: cls(params, compiled=True), values)
    for _ in range(3):
        rows = [torch.randint(len(p), (len(p) // 2,), device=device) for p in run.params[0]]
        run.give(
            [
                torch.sparse_coo_tensor(r[None], torch.randn(len(r), *p.shape[1:], device=device), p.shape)
                for r, p in zip(rows, run.params[0], strict=True)
            ]
        )
        run.step_as_is()
        run.compare(1e-5)
    assert_one_launch(run.ours)


def test_a_grad_scaler(device: torch.device, without_waiting: Any) -> None:
    """With ``fused=True`` the scale and whether to skip stay on the device."""
    run = Lockstep(
        lambda params: torch.optim.AdamW(params, fused=True),
        lambda params: AdamW(params, fused=True),
        on(device, tensors([(7,), (1100,)], torch.float32)),
    )
    scalers = [torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=3) for _ in run.params]
    for i in range(7):
        gradients = [torch.randn_like(p) for p in run.params[0]]
        if i in (2, 4):
            gradients[1][5] = torch.inf
        for scaler, params in zip(scalers, run.params, strict=True):
            scale = scaler.scale(torch.ones((), device=device))
            for p, g in zip(params, gradients, strict=True):
                p.grad = g * scale
        scalers[0].step(run.optimizers[0])
        if i < 1:  # it makes its own tensors in its first step
            scalers[1].step(run.ours)
        else:
            with without_waiting():
                scalers[1].step(run.ours)
        for scaler in scalers:
            scaler.update()
        run.compare(1e-5)
        for theirs, ours in zip(*run.params, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)  # divided by the scale
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert_one_launch(run.ours)


def test_parameters_on_the_host_beside_those_on_the_device(device: torch.device) -> None:
    values = tensors([(7,), (1100,)], torch.float32)
    run = Lockstep(
        torch.optim.AdamW, lambda params: AdamW(params, compiled=True), [*values, *on(device, values), values[0]]
    )
    run.step(3)
    run.compare(1e-5)
    assert {row.device: row.tensors for row in explain(run.ours)} == {"cpu": 3, str(device): 2}
    assert {row.execution for row in explain(run.ours)} == {"multi_tensor"}


def test_two_devices_in_one_optimizer(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA device")
    values = tensors([(7,), (1100,)], torch.float32)
    run = Lockstep(
        torch.optim.AdamW,
        lambda params: AdamW(params, compiled=True),
        [*on(torch.device("cuda:1"), values), *on(torch.device("cuda:0"), values)],
    )
    run.step(3)
    run.compare(1e-5)
    assert {row.device: row.launches for row in explain(run.ours)} == {"cuda:0": 1, "cuda:1": 1}


def test_70_000_tensors(device: torch.device) -> None:
    """More than the second dimension of a grid has."""
    values = list(torch.randn(70_000, 3, device=device).unbind())
    run = Lockstep(
        lambda params: torch.optim.AdamW(params, fused=True), lambda params: AdamW(params, compiled=True), values
    )
    gradients = torch.randn(70_000, 3, device=device).unbind()
    for params in run.params:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
    run.step_as_is()
    run.step_as_is()
    theirs, ours = (torch.stack([p.detach() for p in params]) for params in run.params)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_one_launch(run.ours, tensors=70_000)


def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    elements = 2**32 + 1027
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if free < 5 * elements:
        pytest.skip(f"{free >> 30} GiB are free, and 20 GiB are needed")
    p = torch.nn.Parameter(torch.full((elements,), 2.0, dtype=torch.bfloat16, device=device))
    p.grad = torch.ones_like(p)
    p.grad[-1] = 3
    SGD([p], lr=0.5, compiled=True).step()
    assert p[-1] == 0.5
    for part in p.detach()[:-1].split(2**28):
        assert (part == 1.5).all()


def test_a_step_allocates_nothing_of_a_parameters_size(device: torch.device) -> None:
    params = [parameter(t) for t in on(device, [torch.ones(1 << 20) for _ in range(16)])]
    optimizer = AdamW(params, compiled=True)
    set_gradients(params)
    optimizer.step()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for _ in range(3):
        optimizer.step()
    assert torch.cuda.max_memory_allocated(device) - before < 1 << 20
