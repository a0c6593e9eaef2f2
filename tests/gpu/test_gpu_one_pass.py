"""Clipping, skipping, averages and masters in the launch of an update, beside separate passes of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_torch import parameter
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from compiled_optim import SGD, AdamW, explain

pytestmark = pytest.mark.gpu

SHAPES = [(7,), (3, 5), (4099,)]
DECAY, MOST = 0.75, 0.5
EVERYTHING = {"max_grad_norm": MOST, "skip_nonfinite": True, "ema_decay": DECAY}
each_way = pytest.mark.parametrize(
    "way", [{"capturable": True}, {"fused": True}, {}], ids=["capturable", "fused", "host"]
)


class Apart:
    """An optimizer of ours that does all in one pass, and torch's with passes before and after it."""

    def __init__(self, device: torch.device, way: dict[str, Any], **around: Any) -> None:
        values = [torch.randn(shape, device=device) for shape in SHAPES]
        self.params, self.others = ([parameter(v) for v in values] for _ in range(2))
        self.ours = AdamW(self.params, lr=0.01, compiled=True, **way, **around)
        self.theirs = torch.optim.AdamW(self.others, lr=0.01)
        self.averages: list[Tensor] = []
        for p in self.params:
            p.grad = torch.zeros_like(p)

    def give(self, scale: float = 1.0, overflows: bool = False) -> None:
        """New gradients in the place of the old ones."""
        for p, q in zip(self.params, self.others, strict=True):
            q.grad = torch.randn_like(q) * scale
            if overflows:
                q.grad.view(-1)[0] = torch.inf
            p.grad.copy_(q.grad)

    def step_theirs(self) -> None:
        self.norm = clip_grad_norm_(self.others, MOST)
        if not self.norm.isfinite():
            return
        self.theirs.step()
        new = [q.detach().clone() for q in self.others]
        self.averages = [a.lerp(q, 1 - DECAY) for a, q in zip(self.averages or new, new, strict=True)]

    def compare(self) -> None:
        for i, (p, q) in enumerate(zip(self.params, self.others, strict=True)):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
            if self.averages:
                torch.testing.assert_close(self.ours.state[p]["ema"], self.averages[i], rtol=1e-5, atol=1e-6)
        norm = self.ours.grad_norm.float()  # on the host where that had to know it
        torch.testing.assert_close(norm, self.norm, rtol=1e-5, atol=1e-6, check_device=False)


def assert_one_launch(optimizer: Any) -> None:
    (row,) = explain(optimizer)
    assert (row.execution, row.launches) == ("multi_tensor", 1 + ("on_device" in row.kernel))


@each_way
def test_clipping_and_averaging_wait_for_nothing(way: Any, device: torch.device, without_waiting: Any) -> None:
    run = Apart(device, way, max_grad_norm=MOST, ema_decay=DECAY)
    for _ in range(4):
        run.give()
        with without_waiting():
            run.ours.step()
        run.step_theirs()
        run.compare()
    assert run.ours.grad_norm.device == device
    assert_one_launch(run.ours)


@each_way
def test_a_step_that_is_not_finite_is_skipped(way: Any, device: torch.device, without_waiting: Any) -> None:
    run = Apart(device, way, **EVERYTHING)
    for overflows in (True, False, True, False, False):
        run.give(overflows=overflows)
        if way:
            with without_waiting():
                run.ours.step()
        else:  # the host counts, so it has to know
            run.ours.step()
        run.step_theirs()
        run.compare()
    assert run.ours.skipped_steps == 2
    assert int(run.ours.state[run.params[0]]["step"]) == 3
    assert_one_launch(run.ours)


@each_way
def test_a_grad_scaler_in_one_pass(way: Any, device: torch.device) -> None:
    """Its scale is a part of the factor: gradients stay scaled."""
    run = Apart(device, way, **EVERYTHING)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=3)
    for overflows in (True, False, False, True, False):
        run.give(overflows=overflows)
        scale = scaler.scale(torch.ones((), device=device))
        for p in run.params:
            p.grad.mul_(scale)
        given = [p.grad.clone() for p in run.params]
        scaler.step(run.ours)
        scaler.update()
        run.step_theirs()
        run.compare()
        assert all(map(torch.equal, given, [p.grad for p in run.params]))
    assert run.ours.skipped_steps == 2
    assert_one_launch(run.ours)


@pytest.mark.parametrize("way", [{"fused": True}, {}], ids=["fused", "host"])
def test_masters(way: Any, device: torch.device) -> None:
    """They are the parameters of a float32 run on the same gradients."""
    values = [torch.randn(shape, device=device).bfloat16() for shape in SHAPES]
    params, wide = [parameter(v) for v in values], [parameter(v.float()) for v in values]
    ours = AdamW(params, lr=0.01, master_weights=True, compiled=True, max_grad_norm=MOST, ema_decay=DECAY, **way)
    theirs = torch.optim.AdamW(wide, lr=0.01)
    for _ in range(3):
        for p, q in zip(params, wide, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        ours.step()
        clip_grad_norm_(wide, MOST)
        theirs.step()
        for p, q in zip(params, wide, strict=True):
            master = ours.state[p]["master"]
            assert torch.equal(p, master.bfloat16())
            torch.testing.assert_close(master, q.detach(), rtol=1e-5, atol=1e-6)
    assert_one_launch(ours)


@pytest.mark.parametrize("way", [{"fused": True}, {"compiled": True}], ids=["fused", "host"])
def test_rounding_at_random(way: Any, device: torch.device) -> None:
    """As an eager step on the CPU. Half a gradient is exact in any arithmetic."""
    values = [torch.randn(shape).bfloat16() for shape in SHAPES]
    params, others = ([parameter(v.to(place)) for v in values] for place in (device, "cpu"))
    ours, reference = (SGD(ps, lr=0.5, stochastic_rounding=3, **how) for ps, how in ((params, way), (others, {})))
    for _ in range(3):
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.to(device)
        ours.step()
        reference.step()
        assert all(torch.equal(p.cpu(), q) for p, q in zip(params, others, strict=True))
    assert_one_launch(ours)


@pytest.mark.parametrize("way", [{"capturable": True}, {"fused": True}], ids=["capturable", "fused"])
def test_replays_follow_the_gradients(way: Any, device: torch.device, capture: Any) -> None:
    run = Apart(device, way, **EVERYTHING)
    run.give()
    run.ours.step()
    run.step_theirs()
    with capture() as graph:
        run.ours.step()
    for overflows in (False, True, False):
        run.give(overflows=overflows)
        graph.replay()
        run.step_theirs()
        run.compare()
    assert run.ours.skipped_steps == 1
