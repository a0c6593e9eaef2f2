"""Whole steps on a stand-in for GPUs, through the C++ host and the driver, beside torch.optim on the CPU."""

from __future__ import annotations

import copy
import ctypes
import warnings
from typing import Any

import pytest
import torch
from cases import ELEMENTWISE, FEW_KERNELS, named, rich_options, tolerance, with_all_numbers

from compiled_optim import SGD, AdamW, CompileFallbackWarning, cache_clear, cache_info, explain
from compiled_optim._engine.cache.compiler import BuildError
from compiled_optim._engine.executions import dispatch, lists
from compiled_optim._engine.kernels.backends import cuda_launch
from compiled_optim.swa_utils import AveragedModel

on_device = pytest.importorskip("on_device", exc_type=ImportError)
stand_in, stand_in_gpu = on_device.stand_in, pytest.importorskip("stand_in_gpu", exc_type=ImportError)
Beside, GPU, OTHER_GPU = on_device.Beside, on_device.GPU, on_device.OTHER_GPU

STEPS = 7  # RAdam rectifies from the sixth
MISSING = [(), (0, 3), (), (1,), (2, 4), (0, 1, 2, 3, 4), ()]  # gradients, by step; in one all of them


def cases(pairs: list[tuple[Any, dict[str, Any]]]) -> Any:
    return pytest.mark.parametrize(("cls", "options"), pairs, ids=[f"{c.__name__}-{named(o)}" for c, o in pairs])


def rich(option: str) -> list[tuple[Any, dict[str, Any]]]:
    """The classes that have an option, with it and without or with all other switches."""
    classes = [cls for cls in ELEMENTWISE if option in cls.rule.declaration.options]
    return [(cls, o) for cls in classes for o in ({}, with_all_numbers(cls, rich_options(cls)))]


@cases(FEW_KERNELS)
def test_counted_on_the_host(gpu: Any, cls: Any, options: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)
    run = Beside(gpu, cls, options)
    for missing in MISSING[:4]:
        run.give(missing)
        assert run.step() == ["write", "update"]
        run.compare(tolerance(cls))
    assert run.is_compiled()


@cases(rich("capturable"))
def test_counted_on_the_device(gpu: Any, cls: Any, options: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)
    run = Beside(gpu, cls, options, {"capturable": True})
    for missing in MISSING:
        run.give(missing)
        launched = [] if len(missing) == len(run.params) else ["write", "prologue", "update"]
        assert run.step(waits=False) == launched
        run.compare(tolerance(cls))
    assert run.is_compiled()


@cases(rich("fused"))
def test_fused_counts_on_the_device(gpu: Any, cls: Any, options: dict[str, Any]) -> None:
    """In float32, as torch's fused optimizers do."""
    run = Beside(gpu, cls, options, {"fused": True}, dtype=torch.float32)
    for missing in MISSING[:4]:
        run.give(missing)
        assert run.step(waits=False) == ["write", "prologue", "update"]
        run.compare(1e-5)


# ---- what launches are made of


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["host", "device"])
def test_words_are_written_when_they_change(gpu: Any, options: dict[str, Any]) -> None:
    run = Beside(gpu, SGD, {"lr": 0.1}, {"fused": True} if options else {})
    run.give()
    run.step()
    run.give()
    run.step()  # SGD tells the first step from others, but no later ones from each other
    run.give()
    kernels = run.step()
    assert "write" not in kernels
    run.params[1].grad = run.params[1].grad.clone()
    run.step()
    (write,) = [launch for launch in gpu.launches if launch.kernel == "write"]
    assert len(write.values["words"]) == 8  # one address
    run.compare()


def test_two_devices_and_the_cpu(gpu: Any) -> None:
    torch.set_default_dtype(torch.float64)
    shapes = ((3, 5), (7,), (4,), (2, 3), (), (9,))
    run = Beside(gpu, AdamW, {"lr": 0.02}, devices=(GPU, on_device.CPU, OTHER_GPU), shapes=shapes)
    for missing in MISSING[:4]:
        run.give(missing)
        run.step()
        run.compare()
        launched = {launch.device for launch in gpu.launches if launch.kernel == "update"}
        assert launched == {p.device.index for p in run.params if p.grad is not None and p.device.type != "cpu"}
    assert run.is_compiled()
    assert {row.device for row in explain(run.optimizer)} == {"cpu", str(GPU), str(OTHER_GPU)}


# ---- numbers that lie on the device


@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}], ids=lambda o: next(iter(o)))
def test_hyperparameters_that_are_tensors(gpu: Any, options: dict[str, Any]) -> None:
    """They are read where they lie, changed in place and replaced; no step compiles anything anew."""
    torch.set_default_dtype(torch.float64)
    run = Beside(gpu, AdamW, {"lr": 0.1, "betas": (0.8, 0.9)}, options)
    lr, beta = (on_device.on(GPU, v, torch.float64) for v in (0.1, 0.8))
    for group in run.optimizer.param_groups:
        group["lr"], group["betas"] = lr, (beta, 0.9)
    run.reference.param_groups[1]["lr"] = 0.1
    before = None
    for i in range(5):
        run.give()
        run.step(waits=False)
        run.compare()
        misses = cache_info().misses
        assert before in (None, misses)
        before = misses
        lr.fill_(0.1 / (i + 2))
        beta.fill_(0.8 - 0.1 * i)
        if i == 3:
            for group in run.optimizer.param_groups:
                group["lr"] = lr.clone().float()
        for group in run.reference.param_groups:
            group["lr"], group["betas"] = lr.float().item() if i == 3 else lr.item(), (beta.item(), 0.9)
    assert len(run.optimizer._execution.rebuilt) == 1


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@cases([(cls, {}) for cls, o in rich("fused") if not o])
def test_a_grad_scaler(gpu: Any, cls: Any, options: dict[str, Any], scaled: bool) -> None:
    """As torch.amp.GradScaler hands its tensors to a fused optimizer: a step that overflows is skipped, not counted."""
    run = Beside(gpu, cls, options, {"fused": True}, dtype=torch.float32)
    scale = 64.0 if scaled else 1.0
    for overflow in (0.0, 1.0, 0.0, 0.0):
        run.give()
        for p in run.params:
            p.grad.mul_(scale)
        run.optimizer.found_inf = on_device.on(GPU, overflow)
        run.optimizer.grad_scale = on_device.on(GPU, scale) if scaled else None
        given = [p.grad.cpu() for p in run.params]
        if overflow:
            gpu.reset()
            with stand_in.no_waiting():
                run.optimizer.step()
            gpu.check()
        else:
            run.step(waits=False)
        run.compare(1e-5)
        for p, q, g in zip(run.params, run.theirs, given, strict=True):
            assert torch.equal(p.grad.cpu(), g if overflow else q.grad)
    assert run.is_compiled()


def another_layout(run: Any, patch: pytest.MonkeyPatch) -> None:
    p = run.params[3]
    p.grad = p.grad.t().contiguous().t()


def gaps(run: Any, patch: pytest.MonkeyPatch) -> None:
    p = run.params[4]
    p.data = torch.stack([p.detach(), p.detach()], 1)[:, 0]


def graphs_over_lists(run: Any, patch: pytest.MonkeyPatch) -> None:
    """Eager steps in their stead: the stand-in has no compiler of graphs."""
    run.optimizer._compiled = "foreach"

    def prepare(work: Any, fallback: Any, only: Any = None) -> Any:
        return lambda: (lists.step(work), ([], "eager"))[1]

    patch.setattr(dispatch, "_prepare_graphs", prepare)


def no_driver(run: Any, patch: pytest.MonkeyPatch) -> None:
    def raises(*arguments: Any) -> None:
        raise BuildError("there is none")

    patch.setattr(cuda_launch, "load", raises)
    cache_clear()


@pytest.mark.parametrize(
    ("way", "begins"),
    [*((w, i) for w in (another_layout, gaps) for i in (0, 1, 2)), (graphs_over_lists, 0), (no_driver, 0)],
)
def test_a_grad_scaler_where_launches_do_not_divide(
    gpu: Any, way: Any, begins: int, monkeypatch: pytest.MonkeyPatch, lenient: None
) -> None:
    """Gradients are divided once, and a step that overflows is skipped, whichever way a step takes."""
    cache_clear()
    run = Beside(gpu, AdamW, {"lr": 0.01}, {"fused": True}, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileFallbackWarning)
        for i, overflow in enumerate((0.0, 1.0, 0.0, 1.0, 0.0)):
            run.give()
            for p in run.params:
                p.grad.mul_(64.0)
            if i == begins:
                way(run, monkeypatch)
            given = [p.grad.cpu() for p in run.params]
            run.optimizer.found_inf, run.optimizer.grad_scale = on_device.on(GPU, overflow), on_device.on(GPU, 64.0)
            run.optimizer.step()
            if not overflow:
                run.reference.step()
            run.compare(1e-5)
            for p, q, g in zip(run.params, run.theirs, given, strict=True):
                assert torch.equal(p.grad.cpu(), g if overflow else q.grad)


def test_an_average_of_tensors_on_the_host_and_on_a_device(gpu: Any) -> None:
    """Models are counted on the device, which only the tensors on the host wait for."""
    model = torch.nn.ParameterList([torch.randn(7, device=GPU), torch.randn(5)])
    average = AveragedModel(model, compiled=True)
    average.n_averaged = average.n_averaged.to(GPU)
    seen = []
    for _ in range(4):
        with torch.no_grad():
            for p in model:
                p.add_(on_device.on(p.device, 1.0))
        seen.append([p.detach().cpu().clone() for p in model])
        average.update_parameters(model)
        for p, values in zip(average.module, zip(*seen, strict=True), strict=True):
            torch.testing.assert_close(p.detach().cpu(), torch.stack(values).mean(0))
    assert gpu.kernels.count("update") == 4
    assert average.n_averaged.item() == 4


def test_an_average_on_the_host_of_a_model_on_a_device(gpu: Any) -> None:
    model = torch.nn.ParameterList([torch.randn(7, device=GPU)])
    average = AveragedModel(model, torch.device("cpu"), compiled=True)
    seen = []
    for _ in range(4):
        with torch.no_grad():
            model[0].add_(on_device.on(GPU, 1.0))
        seen.append(model[0].detach().cpu().clone())
        average.update_parameters(model)
        torch.testing.assert_close(average.module[0].detach(), torch.stack(seen).mean(0))
    assert average.module[0].is_cpu
    assert not gpu.kernels.count("update")


# ---- graphs


def replay(gpu: Any, run: Any, graph: Any) -> None:
    """A step of both, of ours from a graph, whose words are lost before."""
    for launch in gpu.captured:
        if launch.kernel == "write":
            ctypes.memset(launch.values["to"], 0, len(launch.values["words"]))
    graph.replay()
    run.reference.step()


@cases(rich("capturable"))
def test_a_step_is_captured(gpu: Any, cls: Any, options: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)
    run = Beside(gpu, cls, options, {"capturable": True})
    run.give()
    run.step(waits=False)
    before = [p.detach().clone() for p in run.params]
    gpu.reset()
    with stand_in.capture() as graph:
        run.optimizer.step()
    gpu.check()
    assert gpu.kernels == ["write", "prologue", "update"]
    gpu.captured = gpu.launches
    assert all(map(torch.equal, before, run.params))
    for _ in range(STEPS - 1):
        run.give()
        replay(gpu, run, graph)
        gpu.check()
        run.compare(tolerance(cls))


# ---- state and errors


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["host", "device"])
def test_a_checkpoint_goes_to_torch_and_back(gpu: Any, options: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)
    run = Beside(gpu, AdamW, {"lr": 0.1, "amsgrad": True}, options)
    for _ in range(2):
        run.give()
        run.step()
    saved = run.optimizer.state_dict()
    run.reference.load_state_dict(copy.deepcopy(saved))  # a load keeps step counts that lie on the CPU
    for group in run.reference.param_groups:
        group["capturable"] = False
    run.optimizer = AdamW(on_device.two_groups(run.params), lr=1.0, amsgrad=True, compiled=True, **options)
    run.optimizer.load_state_dict(saved)
    for _ in range(2):
        run.give()
        run.step(waits=not options)
        run.compare()
    assert run.is_compiled()


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["host", "device"])
def test_a_step_that_the_driver_refuses_is_none(gpu: Any, options: dict[str, Any]) -> None:
    """Parameters and state are what they were, and the next step is the one that failed."""
    torch.set_default_dtype(torch.float64)
    run = Beside(gpu, AdamW, {}, options)
    for _ in range(2):
        run.give()
        gpu.fail("cuLaunchKernel", 700)
        with pytest.raises(RuntimeError, match="cuLaunchKernel: an illegal memory access was encountered"):
            run.optimizer.step()
        run.step()
        run.compare()


def test_a_machine_without_a_driver(gpu: Any, lenient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are eager, and the reason is told once."""
    monkeypatch.setattr(stand_in_gpu.Gpu, "open_driver", lambda self: cuda_launch.driver("/nowhere/libcuda.so.1"))
    cache_clear()
    run = Beside(gpu, SGD, {"lr": 0.1})
    run.give()
    with pytest.warns(UserWarning, match=r"the CUDA driver cannot be opened: /nowhere/libcuda\.so\.1"):
        run.optimizer.step()
    run.reference.step()
    run.give()
    assert run.step() == []
    run.compare(1e-6)
    assert {row.execution for row in explain(run.optimizer)} == {"eager"}
