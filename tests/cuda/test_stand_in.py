"""What the other tests rely on: the stand-in for a GPU refuses what makes the host wait, and graphs are replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import stand_in
import torch
from beside_torch import assert_same, state_of
from cases import CLASSES

stand_in.register()
DEVICE, OTHER = stand_in.DEVICES
CAPTURABLE = [cls for cls in CLASSES if "capturable" in cls.rule.declaration.options]
WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t[0] > 0),
    "to the host": lambda t: t.cpu(),
    "from the host": lambda t: torch.tensor(1.0).to(t.device),
    "a tensor of a number": lambda t: torch.tensor(1.0, device=t.device),
    "nonzero": lambda t: t.nonzero(),
    "a mask": lambda t: t[t > 0],
    "equal": lambda t: torch.equal(t, t),
    "coalesce": lambda t: torch.sparse_coo_tensor(torch.zeros_like(t[None], dtype=torch.int64), t).coalesce(),
}


def test_tensors_are_not_on_the_cpu() -> None:
    t = torch.arange(6.0, device=OTHER).view(2, 3)
    t[1] *= 2
    assert t.device == OTHER
    assert t.t().contiguous().cpu().tolist() == [[0, 6], [1, 8], [2, 10]]
    assert (t.to(DEVICE).device, t.to(DEVICE).sum().item()) == (DEVICE, 27)
    for other in (torch.ones(3), torch.ones(3, device=DEVICE)):
        with pytest.raises(RuntimeError, match="same device"):
            t + other


@pytest.mark.parametrize("action", WAITS.values(), ids=WAITS)
def test_waiting_is_refused(action: Callable[[torch.Tensor], Any]) -> None:
    t = torch.ones(3, device=DEVICE)
    action(t)
    with stand_in.no_waiting():
        torch.full((), 2.0, device=DEVICE).add_(torch.tensor(3.0))  # scalars of the host are handed over by value
        with pytest.raises(stand_in.WaitError):
            action(t)


def test_a_graph_is_recorded_and_replayed() -> None:
    t = torch.ones(3, device=DEVICE)
    with stand_in.capture() as graph:
        doubled = t * 2
        t += doubled
        count = torch.zeros((), device=DEVICE).add_(1)
    assert t.tolist() == [1.0] * 3
    for _ in range(2):
        graph.replay()
    assert (t.tolist(), doubled.tolist(), count.item()) == ([9.0] * 3, [6.0] * 3, 1)


@pytest.mark.parametrize("cls", CAPTURABLE, ids=lambda cls: cls.__name__)
def test_an_eager_step_is_captured(cls: Any) -> None:
    """As torch.optim's are on a GPU."""
    start, gradients = torch.randn(5), torch.randn(9, 5)
    runs = []
    for device, capturable in ((DEVICE, True), (torch.device("cpu"), False)):
        p = torch.nn.Parameter(start.to(device))
        p.grad = torch.zeros_like(p)
        optimizer = cls([p], capturable=capturable)
        runs.append((optimizer, p))
    (ours, p), (reference, q) = runs
    graph = None
    for i, g in enumerate(gradients):
        p.grad.copy_(g)
        q.grad.copy_(g)
        reference.step()
        if i == 0:
            with stand_in.no_waiting():
                ours.step()
            with stand_in.capture() as graph:
                ours.step()
        else:
            assert graph is not None
            graph.replay()
    assert_same(p.cpu(), q, 1e-5)
    for name, value in state_of(reference, q).items():
        assert_same(state_of(ours, p)[name].cpu(), value, 1e-5, name)
