"""The parts of ``bench/on_gpu.py`` that need more than a clock, on the stand-in for a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

stand_in = pytest.importorskip("stand_in", exc_type=ImportError)
MODEL = [(3, 5), (700,)]
US = 2.0


@pytest.fixture
def bench(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    import on_gpu

    def once(steps: dict[str, Any], rounds: int = 1) -> dict[str, float]:
        for step in steps.values():
            step()
        return dict.fromkeys(steps, US)

    class Graph:
        def replay(self) -> None:
            self.recorded.replay()

    @contextmanager
    def capture(graph: Any) -> Any:
        with stand_in.capture() as graph.recorded:
            yield

    monkeypatch.setattr(on_gpu, "DEVICE", stand_in.DEVICES[0])
    monkeypatch.setattr(on_gpu, "on_device", once)
    monkeypatch.setattr(on_gpu, "on_host", once)
    monkeypatch.setattr(on_gpu, "MODELS", dict.fromkeys(on_gpu.MODELS, MODEL))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return on_gpu


def test_blocks(bench: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MODELS", {"ResNet-50": MODEL})
    results = bench.blocks()
    names = [f"{warps} warps, {width} bytes" for warps, width in bench.BLOCKS]
    assert [{*r["device"]} for r in results] == [{*names}] * 2
    assert [r["bytes"] for r in results] == [715 * 28, 715 * 14]
    # of each a first step, and then one of each in rotation
    updates = [launch.block for launch in gpu.launches if launch.kernel == "update"]
    fp32, bf16 = ([32 * warps * bytes_ // size for warps, bytes_ in bench.BLOCKS] for size in (4, 2))
    assert updates == [*fp32 * 2, *bf16 * 2]


def test_one_pass(bench: Any, gpu: Any) -> None:
    results = bench.one_pass()
    assert [(r["model"], r["dtype"]) for r in results[:2]] == [("100 small tensors", d) for d in ("fp32", "bf16")]
    # parameter, two moments and average are read and written, the gradient is read twice; then bfloat16 with a master
    assert [r["bytes"] for r in results[:2]] == [715 * (4 * 8 + 2 * 4), 715 * (4 + 4 * 8 + 2 * 2)]
    assert {*results[0]["device"]} >= {"ours", "ours, fused=True"}


def test_graphs(bench: Any) -> None:
    assert [(r["model"], r["dtype"]) for r in bench.graphs()] == [
        (model, dtype) for model in ("100 small tensors", "ResNet-50") for dtype in ("fp32", "bf16")
    ]


def test_words(bench: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels_of(step: Any) -> dict[str, tuple[float, float]]:
        gpu.reset()
        step()
        found = [launch.kernel for launch in gpu.launches] or ["Memcpy HtoD"]
        return {name: (found.count(name), US) for name in found}

    monkeypatch.setattr(bench, "kernels_of", kernels_of)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t)
    for result in bench.words():
        assert result["words"] == 6 * len(MODEL)
        assert result["launches"] == 1
        assert result["device"] == {"write": US, "pinned copy": US}
