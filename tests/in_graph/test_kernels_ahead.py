"""A compiled step in a graph: its kernel is compiled beside the graph, and its errors are the step's."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Pair, batch, build, compile_alone, train

import compiled_optim
from compiled_optim import SGD
from compiled_optim._engine.executions import survey
from compiled_optim._engine.executions.state import make_state
from compiled_optim.testing import assert_compiles


@pytest.fixture(autouse=True)
def _no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COMPILED_OPTIM_CACHE_DIR", str(tmp_path / "cache"))
    compiled_optim.cache_clear()
    yield
    compiled_optim.cache_clear()


def test_it_is_there_when_the_graph_is() -> None:
    known: list[int] = []
    cache = compiled_optim.cache_dir()
    assert cache is not None

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for thread in threading.enumerate():
            if thread.name == "compiled_optim":
                thread.join()
        known.append(sum("SGD" in manifest.read_text() for manifest in cache.glob("*.json")))
        return graph.forward

    model, optimizer = build(SGD, options={"lr": 0.1, "compiled": True})
    with assert_compiles(kernels=1):
        compile_alone(train, backend)(model, optimizer, None, *batch(0))
    assert known == [0, 1]
    assert [row.origin for row in compiled_optim.explain(optimizer)] == ["compiled"]
    assert compiled_optim.cache_info() == (0, 0, 1, 1)


def test_a_parameter_without_a_gradient_has_none_compiled() -> None:
    model, optimizer = build(SGD, options={"lr": 0.1, "compiled": True})
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "momentum": 0.9})
    with assert_compiles(kernels=1):
        compile_alone(train)(model, optimizer, None, *batch(0))


@pytest.mark.parametrize("compiled", [False, True], ids=["traced", "compiled"])
def test_a_bad_option_raises_as_outside(compiled: bool) -> None:
    model, optimizer = build(SGD, options={"lr": 0.1, "compiled": compiled})
    optimizer.param_groups[0]["lr"] = "x"
    with pytest.raises(TypeError, match="lr must be"):
        compile_alone(train)(model, optimizer, None, *batch(0))


def test_state_is_not_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*args: Any, allocate: bool = True) -> dict[str, Any]:
        made.append(allocate)
        return make_state(*args, allocate=allocate)

    monkeypatch.setattr(survey, "make_state", counted)
    model, optimizer = build(SGD, options={"lr": 0.1, "momentum": 0.9, "compiled": True})
    compile_alone(train)(model, optimizer, None, *batch(0))
    assert sum(made) == len(model.trained)


@pytest.mark.usefixtures("lenient")
def test_without_a_compiler_the_step_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    pair = Pair(SGD, {"lr": 0.1, "compiled": True})
    with pytest.warns(compiled_optim.CompileFallbackWarning, match="false"):
        pair.step()
    pair.step(2)
    pair.compare_parameters()
    assert [row.execution for row in compiled_optim.explain(pair.ours)] == ["eager"]
