"""Steps on several streams and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from beside_torch import parameter, tensors
from torch import Tensor

from compiled_optim import AdamW, explain

pytestmark = pytest.mark.gpu

STEPS = 40


class Run:
    """An optimizer of ours and its parameters, and torch's with equal ones."""

    def __init__(self, device: torch.device, **options: Any) -> None:
        values = [torch.randn(shape, device=device) for shape in [(1 << 20,), (4099,), *[(7,)] * 50]]
        self.ours, self.theirs = [parameter(v) for v in values], [parameter(v) for v in values]
        self.optimizers = (AdamW(self.ours, **options, compiled=True), torch.optim.AdamW(self.theirs, fused=True))
        self.gradients = [[torch.randn_like(v) for v in values] for _ in range(4)]

    def step(self, which: int, i: int) -> None:
        params: list[Tensor] = (self.ours, self.theirs)[which]
        for p, g in zip(params, self.gradients[i % 4], strict=True):
            # a new tensor now and then, so that the words change while earlier launches may still wait for the device
            p.grad = g.clone() if i % 3 else g
        self.optimizers[which].step()

    def compare(self) -> None:
        for i in range(STEPS):
            self.step(1, i)
        torch.cuda.synchronize()
        for p, q in zip(self.ours, self.theirs, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_the_current_stream_is_taken(options: dict[str, Any], device: torch.device) -> None:
    """A long kernel is in front of each step; on another stream the step would read gradients before they are there."""
    run, stream = Run(device, **options), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(STEPS):
            torch.cuda._sleep(1_000_000)
            run.step(0, i)
    torch.cuda.current_stream().wait_stream(stream)
    run.compare()


def test_two_optimizers_on_two_streams(device: torch.device) -> None:
    runs, streams = [Run(device), Run(device)], [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for i in range(STEPS):
        for run, stream in zip(runs, streams, strict=True):
            with torch.cuda.stream(stream):
                run.step(0, i)
    torch.cuda.synchronize()
    for run in runs:
        run.compare()


def test_one_optimizer_whose_stream_changes(device: torch.device) -> None:
    """The words of a launch stay valid for the stream that still waits to run it."""
    run, streams = Run(device), [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for i in range(STEPS):
        before, stream = streams[(i - 1) % 2], streams[i % 2]
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            run.step(0, i)
    torch.cuda.synchronize()
    run.compare()


def test_threads(device: torch.device) -> None:
    """Each has an optimizer and a stream; a launch hands over the interpreter lock."""
    runs = [Run(device) for _ in range(4)]
    torch.cuda.synchronize()

    def train(run: Run) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(STEPS):
                run.step(0, i)
            torch.cuda.current_stream().synchronize()

    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(train, runs))
    for run in runs:
        run.compare()


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_steps_in_the_backward_pass(options: dict[str, Any], device: torch.device) -> None:
    """The thread of each device launches its own: parameters on the host and on the device share no block."""
    values = [t.to(d) for t in tensors([(7,), (3, 5), (131,)]) for d in (device, torch.device("cpu"))]
    lists = [[parameter(v) for v in values] for _ in range(2)]
    ours, ordinary = (AdamW(params, lr=0.1, **options, compiled=True) for params in lists)
    ours.step_in_backward(block_elements=100)
    for _ in range(4):
        for params, optimizer in zip(lists, (ours, ordinary), strict=True):
            torch.autograd.backward(torch.stack([(p * (p + 1)).sum().cpu() for p in params]).sum())
            assert optimizer is ordinary or [p.grad for p in params] == [None] * len(params)
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(*lists, strict=True):
        assert torch.equal(p, q)
    assert {row.device for row in explain(ours)} == {str(device), "cpu"}
