"""Steps that a CUDA graph captures and replays: each replay is one more step, as torch.optim takes it outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import parameter
from torch import Tensor

from compiled_optim import SGD, AdamW, NAdam, lr_scheduler
from compiled_optim.swa_utils import AveragedModel

pytestmark = pytest.mark.gpu

SHAPES = [(7,), (3, 5), (4099,)]


def parameters(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Two equal lists."""
    values = [torch.randn(shape, device=device) for shape in SHAPES]
    return [parameter(v) for v in values], [parameter(v) for v in values]


class Replayed:
    """A function that a graph captures after ``warmup`` calls; every further call replays it.

    The gradients of ``params`` stay where they are: `give` fills them.
    """

    def __init__(self, take: Callable[[], None], params: list[Tensor], capture: Any, warmup: int = 2) -> None:
        self.take, self.params, self.capture, self.left = take, params, capture, warmup
        for p in params:
            p.grad = torch.zeros_like(p)

    def give(self, *others: list[Tensor]) -> None:
        """The same new gradients here and for the parameters of others."""
        for p, *same in zip(self.params, *others, strict=True):
            gradient = torch.randn_like(p)
            p.grad.copy_(gradient)
            for q in same:
                q.grad = gradient.clone()

    def __call__(self) -> None:
        if self.left > 0:
            self.take()
        else:
            if self.left == 0:
                with self.capture() as self.graph:
                    self.take()
            self.graph.replay()
        self.left -= 1


def assert_same(ours: list[Tensor], theirs: list[Tensor], optimizers: tuple[Any, Any] | None = None) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
        for mine, stock in [(o.state[p], s.state[q]) for o, s in [optimizers]] if optimizers else []:
            assert mine.keys() == stock.keys()
            for name, value in stock.items():
                torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, check_device=False)


@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}], ids=["capturable", "fused"])
def test_replays_are_steps(options: dict[str, Any], device: torch.device, capture: Any) -> None:
    params, others = parameters(device)
    ours = AdamW(params, **options, compiled=True)
    theirs = torch.optim.AdamW(others)
    take = Replayed(ours.step, params, capture)
    for _ in range(6):
        take.give(others)
        take()
        theirs.step()
        assert_same(params, others, (ours, theirs))
    assert int(ours.state[params[0]]["step"]) == 6


def test_state_that_is_carried(device: torch.device, capture: Any) -> None:
    params, others = parameters(device)
    ours, theirs = NAdam(params, capturable=True, compiled=True), torch.optim.NAdam(others)
    take = Replayed(ours.step, params, capture)
    for _ in range(5):
        take.give(others)
        take()
        theirs.step()
        assert_same(params, others, (ours, theirs))


def test_a_first_step_in_a_graph(device: torch.device, capture: Any) -> None:
    """Its kernel was built for another optimizer: nothing can be compiled while a graph is captured."""
    params, others = parameters(device)
    built, _ = parameters(device)
    for p in built:
        p.grad = torch.ones_like(p)
    SGD(built, lr=0.1, fused=True).step()
    ours, theirs = SGD(params, lr=0.1, fused=True), torch.optim.SGD(others, lr=0.1)
    take = Replayed(ours.step, params, capture, warmup=0)
    for _ in range(3):
        take.give(others)
        take()
        theirs.step()
        assert_same(params, others)


def test_a_schedule_moves_with_each_replay(device: torch.device, capture: Any) -> None:
    params, others = parameters(device)
    ours = AdamW(params, lr=torch.tensor(0.1, device=device), capturable=True, compiled=True)
    theirs = torch.optim.AdamW(others, lr=0.1)
    ours.attach(lr_scheduler.ExponentialLR(ours, 0.7))
    schedule = torch.optim.lr_scheduler.ExponentialLR(theirs, 0.7)
    take = Replayed(ours.step, params, capture)
    for _ in range(6):
        take.give(others)
        take()
        theirs.step()
        schedule.step()
        assert_same(params, others)
        torch.testing.assert_close(ours.param_groups[0]["lr"].item(), theirs.param_groups[0]["lr"], rtol=1e-6, atol=0)


def test_betas_that_are_tensors(device: torch.device, capture: Any) -> None:
    params, others = parameters(device)
    betas = tuple(torch.tensor(b, device=device) for b in (0.9, 0.99))
    ours = AdamW(params, betas=betas, capturable=True, compiled=True)
    theirs = torch.optim.AdamW(others, betas=(0.9, 0.99))
    take = Replayed(ours.step, params, capture)
    for i in range(6):
        betas[0].fill_(0.9 - 0.1 * i)
        theirs.param_groups[0]["betas"] = (0.9 - 0.1 * i, 0.99)
        take.give(others)
        take()
        theirs.step()
        assert_same(params, others)


def test_a_grad_scaler_in_the_graph(device: torch.device, capture: Any) -> None:
    """A replay divides by the scale, or skips the step and does not count it; the scaler's own update is in it too."""
    params, others = parameters(device)
    pair = (AdamW(params, fused=True), torch.optim.AdamW(others, fused=True))
    scalers = [torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=3) for _ in pair]
    for scaler in scalers:
        scaler.scale(torch.ones((), device=device))  # makes its tensors
    scaled = [torch.zeros_like(p) for p in params]

    def take_ours() -> None:
        for p, g in zip(params, scaled, strict=True):
            p.grad.copy_(g * scalers[0].scale(torch.ones((), device=device)))
        scalers[0].step(pair[0])
        scalers[0].update()

    take = Replayed(take_ours, params, capture)
    for i in range(8):
        for p, q, g in zip(params, others, scaled, strict=True):
            g.copy_(torch.randn_like(p))
            if i in (3, 6):
                g.view(-1)[1] = torch.inf
            q.grad = g * scalers[1].scale(torch.ones((), device=device))
        take()
        scalers[1].step(pair[1])
        scalers[1].update()
        assert_same(params, others, pair)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert int(pair[0].state[params[0]]["step"]) == 6


def test_an_average_of_weights(device: torch.device) -> None:
    module = torch.nn.Linear(300, 5, device=device)
    averages = [AveragedModel(module, compiled=True), torch.optim.swa_utils.AveragedModel(module)]
    for average in averages:
        average.update_parameters(module)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    for average in averages:
        average.update_parameters(module)
    assert_same(list(averages[0].parameters()), list(averages[1].parameters()))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_what_the_host_counts_cannot_be_captured(device: torch.device, capture: Any) -> None:
    """Each replay would take the step that was captured once more. What to do instead is said; nothing is written."""
    params, _ = parameters(device)
    ours = AdamW(params, compiled=True)
    for p in params:
        p.grad = torch.ones_like(p)
    ours.step()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="capturable=True"), capture():
        ours.step()
    assert_same(params, before)
    ours.step()


def test_other_steps_between_replays(device: torch.device, capture: Any) -> None:
    """A graph has words of its own. Steps outside of it, with other gradients and another param group, change none."""
    params, others = parameters(device)
    ours, theirs = AdamW(params, fused=True), torch.optim.AdamW(others)
    take = Replayed(ours.step, params, capture)
    captured = [p.grad for p in params]
    for i in range(8):
        for p, g in zip(params, captured, strict=True):
            p.grad = g
        take.give(others)
        if i % 2 and i > 2:
            for p in params:  # at other addresses
                p.grad = p.grad.clone()
            ours.step()
        else:
            take()
        theirs.step()
        assert_same(params, others)


def test_a_graph_brings_its_words_again(device: torch.device, capture: Any) -> None:
    """Whatever stands in their memory when it is replayed."""
    params, others = parameters(device)
    ours, theirs = AdamW(params, fused=True), torch.optim.AdamW(others)
    take = Replayed(ours.step, params, capture)
    for _ in range(5):
        take.give(others)
        if take.left < 0:
            (launch,) = ours._execution.plan.launches
            launch.context._buffer.zero_()
        take()
        theirs.step()
        assert_same(params, others)
