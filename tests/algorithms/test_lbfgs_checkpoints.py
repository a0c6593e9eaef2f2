"""LBFGS's checkpoints: torch.optim's layout, and training that goes on as if nothing had happened."""

from __future__ import annotations

import copy
import io
import pickle
from collections import defaultdict
from typing import Any

import pytest
import torch
from beside_torch import both, executions
from minimizing import Run, assert_alike, initial, network, pair

from compiled_optim import LBFGS

SIDES: dict[str, Any] = {
    "torch": torch.optim.LBFGS,
    "eager": LBFGS,
    "compiled": lambda params, **options: LBFGS(params, **options, compiled=True),
}
searches = pytest.mark.parametrize("search", [None, "strong_wolfe"])
OPTIONS: dict[str, Any] = {"lr": 0.3, "max_iter": 4, "history_size": 6}


def run_of(side: str, **options: Any) -> Run:
    return Run(network, initial(network), lambda params: SIDES[side](params, **{**OPTIONS, **options}))


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def continue_as(side: str, run: Run) -> Run:
    """Another optimizer, with the parameters and the checkpoint of ``run``."""
    other = Run(network, run.values, lambda params: SIDES[side](params))
    other.optimizer.load_state_dict(saved_and_loaded(run.optimizer.state_dict()))
    return other


@searches
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("after", SIDES)
@pytest.mark.parametrize("before", SIDES)
def test_training_goes_on_on_either_side(before: str, after: str, steps: int, search: str | None) -> None:
    uninterrupted, run = run_of("torch", line_search_fn=search), run_of(before, line_search_fn=search)
    uninterrupted.step(steps)
    run.step(steps)
    other = continue_as(after, run)
    again = continue_as(before, other)  # without a step in between
    for continued in (other, again):
        assert continued.optimizer.param_groups[0]["history_size"] == 6
        continued.step(3)
    uninterrupted.step(3)
    assert_alike(other, uninterrupted)
    assert_alike(again, uninterrupted)


@both
@pytest.mark.parametrize("iterations", [1, 2, 9])
def test_the_layout_is_that_of_torch(iterations: int, compiled: bool) -> None:
    ours, theirs = pair(network, compiled, max_iter=iterations, history_size=5)
    for run in (ours, theirs):
        run.step()
    mine, stock = (run.optimizer.state_dict() for run in (ours, theirs))
    assert mine["param_groups"] == stock["param_groups"]
    actual, expected = mine["state"][0], stock["state"][0]
    assert set(actual) - set(expected) == set()
    assert {name for name, value in expected.items() if value is not None} <= set(actual)
    for name, value in actual.items():
        if name != "al":  # torch's scratch
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    assert len(actual.get("al", ())) == len(expected.get("al", ()))


@both
def test_a_checkpoint_is_no_part_of_the_optimizer(compiled: bool) -> None:
    """Its history does not change as training goes on, and holds no more than what is used."""
    run = run_of("compiled" if compiled else "eager", history_size=50)
    run.step(2)
    state = run.optimizer.state_dict()["state"][0]
    kept = copy.deepcopy(state)
    run.step(20)
    for name in ("old_dirs", "old_stps", "ro", "d", "prev_flat_grad"):
        torch.testing.assert_close(state[name], kept[name], rtol=0, atol=0)
    assert {row.untyped_storage().nbytes() for row in state["old_dirs"]} == {66 * 8}


@both
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_their_own_way(duplicate: Any, compiled: bool) -> None:
    run = run_of("compiled" if compiled else "eager")
    run.step(2)
    twin = copy.copy(run)
    twin.params, twin.optimizer = duplicate((run.params, run.optimizer))
    assert twin.optimizer.param_groups[0]["params"][0] is twin.params[0]
    assert twin.step() == run.step()
    assert_alike(twin, run, 0)
    assert executions(twin.optimizer) == executions(run.optimizer)
    twin.step()
    assert not torch.equal(twin.values[0], run.values[0])


@both
def test_a_smaller_or_larger_history_is_loaded(compiled: bool) -> None:
    run = run_of("torch", history_size=8)
    run.step(4)
    checkpoint = saved_and_loaded(run.optimizer.state_dict())
    for size in (3, 30):
        checkpoint["param_groups"][0]["history_size"] = size
        other = Run(network, run.values, lambda params: LBFGS(params, compiled=compiled))
        other.optimizer.load_state_dict(checkpoint)
        (before,) = other.step()
        assert other.step()[0] < before
        state = other.optimizer.state_dict()["state"][0]
        assert len(state["old_dirs"]) == min(size, 8 + 2 * 4)


@both
def test_a_state_that_is_dropped_begins_anew(compiled: bool) -> None:
    run = run_of("compiled" if compiled else "eager")
    run.step(2)
    run.optimizer.state = defaultdict(dict)
    assert run.optimizer.state_dict()["state"] == {}
    fresh = Run(network, run.values, lambda params: torch.optim.LBFGS(params, **OPTIONS))
    assert run.step(2) == pytest.approx(fresh.step(2), rel=1e-12)
    assert_alike(run, fresh)


@both
def test_state_dict_hooks_see_the_layout_of_torch(compiled: bool) -> None:
    run = run_of("compiled" if compiled else "eager")
    run.step(2)
    seen: list[set[str]] = []
    run.optimizer.register_state_dict_post_hook(lambda _, state: seen.append(set(state["state"][0])))
    run.optimizer.state_dict()
    assert len(seen) == 1
    assert {"old_dirs", "old_stps", "ro", "H_diag"} <= seen[0]
    assert "history" not in seen[0]


# ---- names of parameters


NAMES = ("w", "b", "v", "c")


def named_run(side: str, order: str, values: list[Any] | None = None) -> Run:
    def build(params: list[Any]) -> Any:
        named = dict(zip(NAMES, params, strict=True))
        return SIDES[side]([(name, named[name]) for name in order], **OPTIONS)

    return Run(network, values or initial(network), build)


@pytest.mark.parametrize("before", SIDES)
def test_parameters_in_another_order_are_found_by_name(before: str) -> None:
    run, uninterrupted = named_run(before, "wbvc"), named_run("torch", "wbvc")
    for each in (run, uninterrupted):
        each.step(3)
    other = named_run("eager", "vcwb", run.values)
    other.optimizer.load_state_dict(saved_and_loaded(run.optimizer.state_dict()))
    assert other.optimizer.param_groups[0]["param_names"] == [*"vcwb"]
    other.step(2)
    uninterrupted.step(2)
    assert_alike(other, uninterrupted)


def test_names_that_do_not_match_are_listed() -> None:
    run, other = named_run("eager", "wbvc"), named_run("eager", "vcwb")
    for each in (run, other):
        each.step()
    saved = run.optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = ["w", "b", "v", "bias"]
    before = copy.deepcopy(other.optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=r"LBFGS: .*missing: c; unexpected: bias; to load it by position"):
        other.optimizer.load_state_dict(saved)
    torch.testing.assert_close(other.optimizer.state_dict()["state"], before, rtol=0, atol=0)
