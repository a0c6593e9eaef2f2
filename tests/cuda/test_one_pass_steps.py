"""Clipping, skipping, averages and masters in launches on the stand-in for GPUs, beside separate passes on the CPU."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from beside_torch import assert_same, state_of

from compiled_optim import SGD, Adagrad, AdamW, CompileFallbackWarning, NAdam, cache_clear, explain

on_device = pytest.importorskip("on_device", exc_type=ImportError)
stand_in = on_device.stand_in

from test_cuda_steps import another_layout, gaps, graphs_over_lists, no_driver  # noqa: E402

GPU, OTHER_GPU, CPU = on_device.GPU, on_device.OTHER_GPU, on_device.CPU
SHAPES = ((3, 5), (), (130, 9), (7,))
EVERYTHING = {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.75}
WAYS = {"capturable": {"compiled": True, "capturable": True}, "fused": {"fused": True}, "host": {"compiled": True}}


class Apart(on_device.Beside):
    """Beside torch's optimizer on the CPU, with ``clip_grad_norm_`` before its step and an average after it."""

    def __init__(self, gpu: Any, cls: Any, options: dict[str, Any], around: dict[str, Any], **rest: Any) -> None:
        ours = {**rest.pop("ours", {}), **around}
        super().__init__(gpu, cls, options, ours, **rest)
        self.max_norm, self.norm_type = around.get("max_grad_norm"), around.get("norm_type", 2.0)
        self.skips = around.get("skip_nonfinite", False)
        self.has_norm, self.decay = self.skips or self.max_norm is not None, around.get("ema_decay")
        self.averages: list[Any] = [None] * len(self.theirs)
        self.scale = 1.0
        self.skipped = 0

    def step(self, waits: bool = True) -> list[str]:
        given = [None if p.grad is None else p.grad.clone() for p in self.params]
        self.gpu.reset()
        with nullcontext() if waits else stand_in.no_waiting():
            self.optimizer.step()
        self.gpu.check()
        for p, g in zip(self.params, given, strict=True):
            assert (p.grad is None and g is None) or torch.equal(p.grad.to_dense().cpu(), g.to_dense().cpu())
        self.step_reference()
        return list(self.gpu.kernels)

    def step_reference(self) -> None:
        grads = [q.grad for q in self.theirs if q.grad is not None]
        for g in grads:
            g.div_(self.scale)
        dense = [g.coalesce().values() if g.is_sparse else g for g in grads]
        self.norm = torch.nn.utils.get_total_norm([g.double() for g in dense if g.numel()], self.norm_type)
        if not self.norm.isfinite() and self.skips:
            self.skipped += 1
            return
        if self.max_norm is not None:
            for q in self.theirs:
                if q.grad is not None:
                    q.grad = q.grad * min(1.0, self.max_norm / (self.norm.item() + 1e-6))
        self.reference.step()
        for i, q in enumerate(self.theirs):
            if q.grad is not None and self.decay is not None:
                old = self.averages[i]
                self.averages[i] = q.detach().clone() if old is None else old.lerp(q.detach(), 1 - self.decay)

    def compare(self, rtol: float = 1e-12) -> None:
        for i, (p, q) in enumerate(zip(self.params, self.theirs, strict=True)):
            assert_same(p.cpu(), q, rtol, f"parameter {i}")
            expected, actual = state_of(self.reference, q), state_of(self.optimizer, p)
            if self.averages[i] is not None:
                expected = {**expected, "ema": self.averages[i]}
            for name, value in expected.items():
                value = torch.as_tensor(value, dtype=actual[name].dtype)
                assert_same(actual[name].cpu(), value, rtol, f"{name} of parameter {i}")
        if self.has_norm:
            assert_same(self.optimizer.grad_norm.cpu(), self.norm, rtol, "norm")
        assert self.optimizer.skipped_steps == self.skipped

    def overflow(self) -> None:
        for params in (self.params, self.theirs):
            params[-1].grad.view(-1)[0] = math.inf

    def snapshot(self) -> list[Any]:
        states = [state_of(self.optimizer, p) for p in self.params]
        return [t.detach().cpu().clone() for t in (*self.params, *(v for state in states for v in state.values()))]


def each_way(*names: str) -> Any:
    return pytest.mark.parametrize("way", [WAYS[name] for name in names or WAYS], ids=names or [*WAYS])


def kernels(way: dict[str, Any]) -> list[str]:
    return ["write", "update"] if way is WAYS["host"] else ["write", "prologue", "update"]


def error(way: dict[str, Any]) -> float:
    """Counts of ``fused`` are in float32, and what follows from them."""
    return 1e-7 if "fused" in way else 1e-12


@each_way()
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_clipping(gpu: Any, way: dict[str, Any], norm_type: float) -> None:
    """Two param groups, and gradients that are missing: the norm is of all, and the host waits for nothing."""
    torch.set_default_dtype(torch.float64)
    run = Apart(gpu, AdamW, {"lr": 0.01}, {"max_grad_norm": 0.5, "norm_type": norm_type}, ours=way)
    for missing in ((), (0, 3), (), (1,)):
        run.give(missing)
        assert run.step(waits=False) == kernels(way)
        run.compare(error(way))
    assert run.optimizer.grad_norm.device == GPU
    run.optimizer.max_grad_norm = run.max_norm = 0.01
    run.give()
    run.step(waits=False)
    run.compare(error(way))
    assert run.is_compiled()


@each_way()
def test_steps_that_are_skipped(gpu: Any, way: dict[str, Any]) -> None:
    """They change nothing, also the first of all. Where the host counts it has to wait for the norm."""
    torch.set_default_dtype(torch.float64)
    run = Apart(gpu, AdamW, {"lr": 0.01}, EVERYTHING, ours=way)
    for i, overflows in enumerate((True, False, True, False, False)):
        run.give()
        if overflows:
            run.overflow()
        before = run.snapshot()
        run.step(waits="compiled" in way and "capturable" not in way)
        if overflows and i:
            assert all(map(torch.equal, before, run.snapshot()))
        run.compare(error(way))
    assert run.is_compiled()


@each_way("fused", "host")
@pytest.mark.parametrize("cls", [SGD, NAdam], ids=lambda cls: cls.__name__)
def test_averages(gpu: Any, cls: Any, way: dict[str, Any]) -> None:
    """The first is the parameter, also after a step that was skipped and where an algorithm counts no steps."""
    if "fused" in way and cls is NAdam:
        way = WAYS["capturable"]
    torch.set_default_dtype(torch.float64)
    options = {"lr": 0.01, **({"momentum": 0.5, "dampening": 0.25} if cls is SGD else {})}
    run = Apart(gpu, cls, options, {"ema_decay": 0.75, "skip_nonfinite": True}, ours=way)
    for overflows in (True, False, False, True, False):
        run.give()
        if overflows:
            run.overflow()
        run.step(waits=way is WAYS["host"])
        run.compare(error(way))
    run.optimizer.ema_decay = run.decay = 0.5
    run.give()
    run.step(waits=way is WAYS["host"])
    run.compare(error(way))
    assert run.is_compiled()


def test_a_decay_that_depends_on_the_step(gpu: Any) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=GPU))
    p.grad = torch.ones_like(p)
    for way in ({"fused": True}, {"capturable": True}, {"capturable": True, "compiled": True}):
        optimizer = AdamW([p], ema_decay=lambda t: t / (t + 9), **way)
        with pytest.raises(RuntimeError, match="ema_decay must be a number where step counts lie on the device"):
            optimizer.step()
        assert not optimizer.state
    AdamW([p], ema_decay=lambda t: t / (t + 9), compiled=True).step()


@each_way()
@pytest.mark.parametrize(
    ("around", "scale"),
    [(EVERYTHING, 3.0), ({"ema_decay": 0.75}, 3.0), ({"ema_decay": 0.75}, None)],  # no float32 holds the inverse of 3
    ids=["everything", "average", "unscaled before"],
)
def test_a_grad_scaler(gpu: Any, way: dict[str, Any], around: dict[str, Any], scale: float | None) -> None:
    """Its scale is a part of the factor, so gradients stay scaled; what it found is one more reason to skip."""
    torch.set_default_dtype(torch.float64)
    run = Apart(gpu, AdamW, {"lr": 0.01}, around, ours=way)
    run.scale = scale or 1.0
    for overflows in (False, True, False):
        run.give()
        for params in (run.params, run.theirs):
            for p in params:
                p.grad.mul_(run.scale)
        if overflows:
            run.overflow()
        run.optimizer.found_inf = on_device.on(GPU, float(overflows))
        run.optimizer.grad_scale = None if scale is None else on_device.on(GPU, scale)
        run.skips = True
        run.step(waits=way is WAYS["host"])
        run.compare(error(way))
    assert run.is_compiled()


@pytest.mark.parametrize(
    ("way", "devices"),
    [
        (WAYS["capturable"], (OTHER_GPU, GPU)),
        (WAYS["host"], (OTHER_GPU, GPU)),
        (WAYS["host"], (OTHER_GPU, CPU, GPU)),
        ({"compiled": False, "capturable": True}, (OTHER_GPU, GPU)),
        ({"compiled": False}, (OTHER_GPU, GPU)),
    ],
    ids=["device", "host", "with the CPU", "eager, device", "eager, host"],
)
def test_several_devices(gpu: Any, devices: Any, way: dict[str, Any]) -> None:
    """One norm for all. The host waits for it only where a parameter lies beside it."""
    torch.set_default_dtype(torch.float64)
    skips = way is WAYS["capturable"]
    run = Apart(gpu, AdamW, {"lr": 0.01}, {**EVERYTHING, "skip_nonfinite": skips}, ours=way, devices=devices)
    for missing, overflows in (((), False), ((1, 3), skips), ((), False)):
        run.give(missing)
        if overflows:
            run.overflow()
        run.step(waits=CPU in devices)
        run.compare()
    assert run.optimizer.grad_norm.device == (CPU if CPU in devices else OTHER_GPU)
    assert run.is_compiled() == way["compiled"]


@each_way("fused", "host")
@pytest.mark.parametrize("cls", [SGD, Adagrad], ids=lambda cls: cls.__name__)
def test_sparse_gradients(gpu: Any, cls: Any, way: dict[str, Any]) -> None:
    """Those that are coalesced, or the host would wait for the number of rows; in a first step it checks them."""
    torch.set_default_dtype(torch.float64)

    def sparse() -> None:
        for p, q in zip(run.params, run.theirs, strict=True):
            rows = torch.randperm(len(q))[: len(q) // 2]
            values = torch.randn(len(rows), *q.shape[1:])
            q.grad = torch.sparse_coo_tensor(rows[None], values, q.shape).coalesce()
            p.grad = q.grad.to(p.device)

    around = {"max_grad_norm": 0.5, "skip_nonfinite": True}
    run = Apart(gpu, cls, {"lr": 0.1}, around, ours=way, shapes=((9, 4), (6,)))
    for overflows in (False, True, False):
        sparse()
        if overflows:
            for params in (run.params, run.theirs):
                params[0].grad._values()[0, 0] = math.inf
        run.step(waits=way is WAYS["host"] or run.optimizer.grad_norm is None)
        run.compare(error(way))
    assert run.is_compiled()


# ---- masters, and moments in other dtypes


@each_way("fused", "host")
@pytest.mark.parametrize("storage", [{"master_weights": True}, {"state_dtype": torch.float32}], ids=["master", "state"])
def test_half_precision(gpu: Any, way: dict[str, Any], storage: dict[str, Any]) -> None:
    """The masters and float32 moments of bfloat16 parameters are those of a float32 run on the same gradients."""
    around = {**EVERYTHING, **storage}
    params = [torch.nn.Parameter(torch.randn(shape, device=GPU).bfloat16()) for shape in SHAPES]
    wide = [torch.nn.Parameter(p.detach().cpu().float()) for p in params]
    ours, reference = AdamW(params, lr=0.01, **around, **way), AdamW(wide, lr=0.01, **EVERYTHING)
    for overflows in (True, False, False, True, False):
        for p, q in zip(params, wide, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cpu().float()
        if overflows:
            params[0].grad[0, 0] = wide[0].grad[0, 0] = math.nan
        gpu.reset()
        with nullcontext() if way is WAYS["host"] else stand_in.no_waiting():
            ours.step()
        gpu.check()
        reference.step()
        for p, q in zip(params, wide, strict=True):
            state, expected = state_of(ours, p), state_of(reference, q)
            if "master" in state:
                assert torch.equal(p.detach().cpu(), state["master"].cpu().bfloat16())
                expected["master"] = q
            else:
                with torch.no_grad():
                    q.copy_(p)  # each step begins with what was rounded
            for name, value in expected.items():
                assert state[name].dtype == torch.float32
                if name != "ema" or "master" in state:
                    assert_same(state[name].cpu(), value, 1e-5, name)
    assert ours.skipped_steps == 2
    assert {row.execution for row in explain(ours)} == {"multi_tensor"}


@each_way("fused", "host")
def test_rounding_at_random(gpu: Any, way: dict[str, Any]) -> None:
    """As an eager step on the CPU, also in the second block of a tensor. Half a gradient is exact in any arithmetic."""
    start = [torch.randn(shape).bfloat16() for shape in SHAPES]
    params, others = ([torch.nn.Parameter(t.to(device)) for t in start] for device in (GPU, CPU))
    ours, reference = (SGD(ps, lr=0.5, stochastic_rounding=3, **how) for ps, how in ((params, way), (others, {})))
    for _ in range(3):
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.to(GPU)
        with stand_in.no_waiting():
            ours.step()
        gpu.check()
        reference.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p.detach().cpu(), q.detach())
    assert {row.execution for row in explain(ours)} == {"multi_tensor"}


def test_rounding_at_random_of_gradients_that_are_scaled(gpu: Any) -> None:
    """The kernel that divides by the scale of a GradScaler also knows the place of each element."""
    start = [torch.randn(shape).bfloat16() for shape in SHAPES]
    params, others = ([torch.nn.Parameter(t.to(device)) for t in start] for device in (GPU, CPU))
    ours = SGD(params, lr=0.5, stochastic_rounding=3, fused=True)
    reference = SGD(others, lr=0.5, stochastic_rounding=3)
    for p, q in zip(params, others, strict=True):
        q.grad = torch.randn_like(q)
        p.grad = (8 * q.grad).to(GPU)
    ours.grad_scale, ours.found_inf = on_device.on(GPU, 8.0), on_device.on(GPU, 0.0)
    with stand_in.no_waiting():
        ours.step()
    gpu.check()
    reference.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p.detach().cpu(), q.detach())
        assert torch.equal(p.grad.cpu(), q.grad)


@pytest.mark.parametrize("elsewhere", [another_layout, gaps, graphs_over_lists, no_driver])
def test_whichever_way_a_step_takes(gpu: Any, elsewhere: Any, monkeypatch: pytest.MonkeyPatch, lenient: None) -> None:
    """A step that overflows is skipped also where its plan goes stale, and where it is none of launches alone."""
    cache_clear()
    torch.set_default_dtype(torch.float64)
    run = Apart(gpu, AdamW, {"lr": 0.01}, EVERYTHING, ours=WAYS["fused"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileFallbackWarning)
        for i, overflows in enumerate((False, True, False, True)):
            run.give()
            if overflows:
                run.overflow()
            if i == 1:
                elsewhere(run, monkeypatch)
            run.step(waits=elsewhere is not another_layout)
            run.compare(1e-7)


# ---- graphs


@each_way("capturable", "fused")
def test_a_captured_step(gpu: Any, way: dict[str, Any]) -> None:
    """It contains the norm, so that replays follow the gradients, and what is skipped is counted in each."""
    torch.set_default_dtype(torch.float64)
    run = Apart(gpu, AdamW, {"lr": 0.01}, EVERYTHING, ours=way)
    run.give()
    run.step(waits=False)
    gpu.reset()
    with stand_in.capture() as graph:
        run.optimizer.step()
    gpu.check()
    for overflows in (False, True, False, True, False):
        run.give()
        if overflows:
            run.overflow()
        before = run.snapshot()
        graph.replay()
        gpu.check()
        run.step_reference()
        run.compare(error(way))
        assert not overflows or all(map(torch.equal, before, run.snapshot()))
    run.optimizer.max_grad_norm = run.max_norm = 0.1  # of steps outside of the graph
    run.give()
    run.step(waits=False)
    run.compare(error(way))
    run.max_norm = 0.5
    run.give()
    kept, value = run.optimizer.grad_norm, run.norm
    graph.replay()
    assert_same(kept.cpu(), value, error(way), "a norm that was read before")
    run.step_reference()
    run.compare(error(way))


def test_an_eager_step_is_captured(gpu: Any) -> None:
    torch.set_default_dtype(torch.float64)
    run = Apart(
        gpu,
        NAdam,
        {"lr": 0.01},
        {"max_grad_norm": 0.5, "ema_decay": 0.75},
        ours={"capturable": True, "compiled": False},
    )
    run.give()
    run.step(waits=False)
    with stand_in.capture() as graph:
        run.optimizer.step()
    for _ in range(3):
        run.give()
        graph.replay()
        run.step_reference()
        run.compare()


def test_a_graph_begins_after_a_step_that_may_be_skipped(gpu: Any) -> None:
    """Each replay of the first would begin to count anew."""
    first, second = (Apart(gpu, AdamW, {"lr": 0.01}, EVERYTHING, ours=WAYS["capturable"]) for _ in range(2))
    first.give()
    first.step()
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.give()
    with pytest.raises(RuntimeError, match="Take a step before the capture"), stand_in.capture():
        second.optimizer.step()
