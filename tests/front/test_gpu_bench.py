"""``make gpu`` and ``make bench-gpu`` without a GPU: what they need, what they time, and the tables they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
MACHINE = {"card": "a card", "torch": "2.11.0", "triton": "3.6.0", "driver": "1.0"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``bench/on_gpu.py`` on the CPU, with two tensors for a model."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import on_gpu

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = perf_counter()

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.time - self.time)

        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(on_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(on_gpu, "MODELS", {"ResNet-50": [(3, 5), (7,)]})
    monkeypatch.setattr(on_gpu, "ALGORITHMS", ["AdamW", "Adamax"])
    monkeypatch.setattr(on_gpu, "kernels_of", lambda step: {"write": (1.0, 2.5)})
    return on_gpu


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import gpu_table

    return gpu_table


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_steps_and_algorithms(bench: Any, table: Any, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    bench.PARTS["copy"] = lambda: 1000.0
    assert bench.measure(output, ["copy", "steps", "algorithms"], MACHINE)
    report = json.loads(output.read_text())
    assert [(r["model"], r["dtype"], r["bytes"]) for r in report["steps"]] == [
        ("ResNet-50", "fp32", 22 * 28),
        ("ResNet-50", "bf16", 22 * 14),
    ]
    assert {*report["steps"][0]["device"]} == {"torch foreach", "torch fused", "ours", "ours, fused=True"}
    assert [(r["algorithm"], "torch fused" in r["device"]) for r in report["algorithms"]] == [
        ("AdamW", True),
        ("Adamax", False),
    ]
    text = table.tables(report)
    assert text.startswith("Medians of rivals in rotation on the same tensors. a card, a copy moves 1000 GB/s.")
    assert [row[0] for row in rows_of(text)] == [
        "AdamW, microseconds on the device",
        "---",
        "ResNet-50, fp32",
        "ResNet-50, bf16",
        "ResNet-50, fp32, microseconds",
        "---",
        "AdamW",
        "Adamax",
    ]


def test_a_part_that_fails_does_not_lose_the_others(bench: Any, table: Any, tmp_path: Path, capsys: Any) -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    bench.PARTS.update(copy=lambda: 1000.0, graphs=fails)
    output = tmp_path / "report.json"
    assert not bench.measure(output, ["graphs", "copy"], MACHINE)
    report = json.loads(output.read_text())
    assert report == {"machine": MACHINE, "errors": {"graphs": "RuntimeError: out of memory"}, "copy": 1000.0}
    assert table.tables(report).endswith("Not measured: graphs (RuntimeError: out of memory).")


def test_without_a_gpu_it_says_so(bench: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        bench.main(str(tmp_path / "report.json"))
    with pytest.raises(SystemExit, match=r"must be one of copy, steps, .* got host, stripes"):
        bench.main(str(tmp_path / "report.json"), "stripes", "host", "copy")
    assert not [*tmp_path.iterdir()]


def test_every_table(bench: Any, table: Any) -> None:
    """Each part has one, of the numbers that are in its part of the report."""
    us = {"torch foreach": 40.0, "torch fused": 20.0, "ours": 10.0, "ours, fused=True": 16.0}
    separate = {"torch fused, separate passes": 60.0, "ours, separate passes": 45.0}
    passes = {**separate, "ours": 15.0, "ours, fused=True": 18.0}
    moved = {"model": "ResNet-50", "dtype": "fp32", "bytes": 5_000_000}  # 10 us at 500 GB/s
    host = {"same gradients": 5.0, "new gradients": 6.0, "giving them": 1.0, "pinned copy": 3.0}
    report = {
        "machine": MACHINE,
        "copy": 1000.0,
        "steps": [{**moved, "device": us, "host": us}],
        "one_pass": [{**moved, "device": passes, "host": passes}],
        "blocks": [{**moved, "device": {"4 warps, 16 bytes": 10.0, "8 warps, 16 bytes": 5.0}}],
        "algorithms": [{**moved, "algorithm": "Adamax", "device": {"torch foreach": 40.0, "ours": 10.0}}],
        "words": [
            {**moved, "words": 966, "launches": 2.0, "host": host, "device": {"write": 2.5, "pinned copy": 2.0}},
        ],
        "graphs": [{**moved, "device": us, "host": us}],
        "first_step": [{"tensors": 10, "seconds": {"cold": 6.0, "warm": 0.2, "torch.optim": 0.1}}],
    }
    assert {*report} - {"machine"} == {*bench.PARTS}
    rows = {row[0]: row[1:] for row in rows_of(table.tables(report))}
    assert rows.pop("---")
    assert rows["10 tensors"] == ["6.00", "0.20", "0.10"]
    assert rows["Adamax"] == ["40", "-", "10", "4.00x", "0.50"]
    assert rows["ResNet-50, 966 words"] == ["2", "2.5", "2", "5", "6", "1", "3"]
    assert "| ResNet-50, fp32 | 40 | 20 | 10 | 16 | 2.00x | 0.25 | 0.50 | 20 | 10 | 16 |" in table.tables(report)
    assert "| ResNet-50, fp32 | 60 | 45 | 15 | 18 | 4.00x | 0.33 | 60 | 45 | 15 | 18 |" in table.tables(report)
    assert "| ResNet-50, fp32 | 0.50 | 1.00 |" in table.tables(report)
    assert "| ResNet-50, fp32 | 20 | 10 | 20 | 10 | 2.00x |" in table.tables(report)


def test_the_readme_has_a_place_for_it(table: Any, tmp_path: Path) -> None:
    report, readme = tmp_path / "report.json", tmp_path / "README.md"
    report.write_text(json.dumps({"machine": MACHINE, "copy": 1234.0}))
    text = (ROOT / "README.md").read_text()
    readme.write_text(text)
    for _ in range(2):
        table.main(report, readme)
        written = readme.read_text()
        assert written.count("a copy moves 1234 GB/s") == 1
        head, _, tail = written.partition("\nMedians of rivals")
        assert text.startswith(head)
        assert text.endswith(tail.partition("<!-- end -->")[2])


BARE = """
import sys
sys.modules.update(dict.fromkeys(("numpy", "hypothesis", "xdist", "pytest_benchmark")))  # cannot be imported
import pytest
sys.path.insert(0, "bench")
import on_gpu, gpu_table
raise SystemExit(pytest.main(["--collect-only", "-q", "-m", "gpu", "tests/gpu"]))
"""


def test_torch_and_pytest_are_enough() -> None:
    """Other packages can perhaps not be installed where the GPU is."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "test_replays_are_steps" in result.stdout
