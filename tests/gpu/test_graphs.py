"""Steps that a CUDA graph captures and replays: each replay is one more step, as torch.optim takes it outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import parameter
from torch import Tensor

from compiled_optim import SGD, AdamW, NAdam, Optimizer, lr_scheduler
from compiled_optim.swa_utils import AveragedModel

pytestmark = pytest.mark.gpu

SHAPES = [(7,), (3, 5), (4099,)]


def parameters(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Two equal lists."""
    values = [torch.randn(shape, device=device) for shape in SHAPES]
    return [parameter(v) for v in values], [parameter(v) for v in values]


class Captured:
    """A function in a CUDA graph, after ``warmup`` calls outside of it on the stream that captures.

    The gradients of ``params`` stay where they are: `give` fills them for the next replay.
    """

    def __init__(self, take: Callable[[], None], params: list[Tensor], warmup: int = 2) -> None:
        self.params = params
        for p in params:
            p.grad = torch.zeros_like(p)
        self.graph = torch.cuda.CUDAGraph()
        self._take, self._left, self._stream = take, warmup, torch.cuda.Stream()

    def give(self, *others: list[Tensor]) -> None:
        """The same new gradients here and for the parameters of others."""
        for row in zip(self.params, *others, strict=True):
            gradient = torch.randn_like(row[0])
            row[0].grad.copy_(gradient)
            for p in row[1:]:
                p.grad = gradient.clone()

    def __call__(self) -> None:
        self._left -= 1
        if self._left >= 0:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._take()
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._left == -1:
            with torch.cuda.graph(self.graph, stream=self._stream):
                self._take()
        self.graph.replay()


def assert_same(ours: list[Tensor], theirs: list[Tensor], optimizers: tuple[Any, Any] | None = None) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
        for mine, stock in [(o.state[p], s.state[q]) for o, s in [optimizers]] if optimizers else []:
            assert mine.keys() == stock.keys()
            for name, value in stock.items():
                torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, check_device=False)


@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}], ids=["capturable", "fused"])
def test_replays_are_steps(options: dict[str, Any], device: torch.device) -> None:
    params, others = parameters(device)
    ours = AdamW(params, **options, compiled=True)
    theirs = torch.optim.AdamW(others, capturable=True)
    take = Captured(ours.step, params)
    for _ in range(6):
        take.give(others)
        take()
        theirs.step()
        assert_same(params, others, (ours, theirs))
    assert int(ours.state[params[0]]["step"]) == 6


def test_state_that_is_carried(device: torch.device) -> None:
    params, others = parameters(device)
    ours, theirs = NAdam(params, capturable=True, compiled=True), torch.optim.NAdam(others, capturable=True)
    take = Captured(ours.step, params)
    for _ in range(5):
        take.give(others)
        take()
        theirs.step()
        assert_same(params, others, (ours, theirs))


def test_a_first_step_in_a_graph(device: torch.device) -> None:
    """Its kernel was built for another optimizer: nothing can be compiled while a graph is captured."""
    params, others = parameters(device)
    built, _ = parameters(device)
    for p in built:
        p.grad = torch.ones_like(p)
    SGD(built, lr=0.1, fused=True).step()
    ours, theirs = SGD(params, lr=0.1, fused=True), torch.optim.SGD(others, lr=0.1)
    take = Captured(ours.step, params, warmup=0)
    for _ in range(3):
        take.give(others)
        take()
        theirs.step()
        assert_same(params, others)


def test_a_schedule_moves_with_each_replay(device: torch.device) -> None:
    params, others = parameters(device)
    ours = AdamW(params, lr=torch.tensor(0.1, device=device), capturable=True, compiled=True)
    theirs = torch.optim.AdamW(others, lr=0.1)
    ours.attach(lr_scheduler.ExponentialLR(ours, 0.7))
    schedule = torch.optim.lr_scheduler.ExponentialLR(theirs, 0.7)
    take = Captured(ours.step, params)
    for _ in range(6):
        take.give(others)
        take()
        theirs.step()
        schedule.step()
        assert_same(params, others)
        torch.testing.assert_close(ours.param_groups[0]["lr"].item(), theirs.param_groups[0]["lr"], rtol=1e-6, atol=0)


def test_betas_that_are_tensors(device: torch.device) -> None:
    params, others = parameters(device)
    betas = tuple(torch.tensor(b, device=device) for b in (0.9, 0.99))
    ours = AdamW(params, betas=betas, capturable=True, compiled=True)
    theirs = torch.optim.AdamW(others, betas=(0.9, 0.99))
    take = Captured(ours.step, params)
    for i in range(6):
        betas[0].fill_(0.9 - 0.1 * i)
        theirs.param_groups[0]["betas"] = (0.9 - 0.1 * i, 0.99)
        take.give(others)
        take()
        theirs.step()
        assert_same(params, others)


def test_a_grad_scaler_in_the_graph(device: torch.device) -> None:
    """A replay divides by the scale, or skips the step and does not count it; the scaler's own update is in it too."""
    params, others = parameters(device)
    pair = (AdamW(params, fused=True), torch.optim.AdamW(others, fused=True))
    scalers = [torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=3) for _ in pair]
    for scaler in scalers:
        scaler.scale(torch.ones((), device=device))  # makes its tensors
    scaled = [torch.zeros_like(p) for p in params]

    def take_ours() -> None:
        for p, g in zip(params, scaled, strict=True):
            p.grad.copy_(g * scalers[0].scale(torch.ones((), device=device)))
        scalers[0].step(pair[0])
        scalers[0].update()

    take = Captured(take_ours, params)
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


def test_what_the_host_counts_cannot_be_captured(device: torch.device) -> None:
    """Each replay would take the step that was captured once more. What to do instead is said; nothing is written."""
    params, _ = parameters(device)
    ours = AdamW(params, compiled=True)
    for p in params:
        p.grad = torch.ones_like(p)
    ours.step()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="capturable=True"):
        capture(ours)
    torch.cuda.synchronize()
    assert_same(params, before)
    ours.step()


def capture(optimizer: Optimizer) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def test_other_steps_between_replays(device: torch.device) -> None:
    """A graph has words of its own. Steps outside of it, with other gradients and another param group, change none."""
    params, others = parameters(device)
    ours, theirs = AdamW(params, fused=True), torch.optim.AdamW(others)
    take = Captured(ours.step, params)
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
