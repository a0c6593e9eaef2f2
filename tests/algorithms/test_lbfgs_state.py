"""The state of LBFGS: how its history grows, where it is made, and what is refused before anything changes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from beside_torch import both
from minimizing import Run, assert_alike, initial, least_squares, network, pair, rosenbrock

from compiled_optim import LBFGS

# ---- the history


@both
def test_a_history_costs_what_is_used(compiled: bool) -> None:
    """A million pairs of these vectors would take a petabyte; deterministic mode fills what is allocated."""
    x = torch.nn.Parameter(torch.linspace(-1, 1, 1 << 26))
    optimizer = LBFGS([x], max_iter=1, history_size=1_000_000, compiled=compiled)

    def closure() -> Any:
        x.grad = x.detach().sign()
        return x.detach()[-1]

    optimizer.step(closure)
    assert sum(ring.nbytes for ring in (optimizer.state[x]["history"].y, optimizer.state[x]["history"].s)) < 1 << 32


@both
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_history_grows_as_pairs_arrive(deterministic: bool, compiled: bool) -> None:
    ours, theirs = pair(rosenbrock, compiled, max_iter=30, history_size=10_000_000, line_search_fn="strong_wolfe")
    torch.use_deterministic_algorithms(deterministic)
    try:
        for _ in range(2):
            ours.step()
            theirs.step()
            assert_alike(ours, theirs, 1e-9)
            history = ours.optimizer.state[ours.params[0]]["history"]
            assert history.count <= len(history.ro) <= 2 * history.count
            (mine, stock) = (run.optimizer.state_dict()["state"][0]["old_dirs"] for run in (ours, theirs))
            torch.testing.assert_close(mine, stock, rtol=1e-6, atol=1e-6)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- modes and devices


@both
@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), torch.inference_mode], ids=["meta", "inference"])
def test_the_first_step_in_a_mode_and_the_next_outside(mode: Callable[[], Any], compiled: bool) -> None:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64)
    courses = []
    for first in (mode, nullcontext):
        p = torch.nn.Parameter(x.clone())
        optimizer = LBFGS([p], lr=0.1, max_iter=6, compiled=compiled)

        def closure(p: Any = p) -> Any:
            p.grad = 4 * p.detach() ** 3
            return (p.detach() ** 4).sum()

        with first():
            optimizer.step(closure)
        courses += [[optimizer.step(closure).item(), optimizer.step(closure).item(), p.tolist()]]
    assert courses[0] == courses[1]


# ---- maximize


@both
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_maximizing_is_minimizing_the_negative(search: str | None, compiled: bool) -> None:
    options: dict[str, Any] = {"lr": 0.3, "max_iter": 5, "line_search_fn": search}
    build: Any = lambda params: LBFGS(params, **options, compiled=compiled, maximize=True)  # noqa: E731
    ours = Run(lambda *params: -network(*params), initial(network), build)
    theirs = Run(network, initial(network), lambda params: torch.optim.LBFGS(params, **options))
    stock = None
    if "maximize" in inspect.signature(torch.optim.LBFGS).parameters:  # since torch 2.14
        stock = Run(ours.loss, ours.values, lambda params: torch.optim.LBFGS(params, **options, maximize=True))
    for _ in range(3):
        assert ours.step() == pytest.approx([-loss for loss in theirs.step()])
        assert_alike(ours, theirs)
        if stock is not None:
            stock.step()
            assert_alike(ours, stock)
    again = Run(ours.loss, ours.values, lambda params: LBFGS(params, compiled=compiled))
    again.optimizer.load_state_dict(ours.optimizer.state_dict())
    again.step()
    theirs.step()
    assert_alike(again, theirs)
    again.optimizer.load_state_dict(theirs.optimizer.state_dict())  # which may be without the key
    assert not again.optimizer.param_groups[0].get("maximize")


# ---- what is refused


def everything(run: Run) -> Any:
    state = {k: v for k, v in run.optimizer.state_dict()["state"][0].items() if not isinstance(v, str)}
    return copy.deepcopy((run.values, state))


def assert_unchanged(run: Run, before: Any) -> None:
    torch.testing.assert_close(everything(run), before, rtol=0, atol=0)


VECTOR = torch.ones(66, dtype=torch.float64)
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "lists of other lengths": ({"ro": []}, "lists of the same length in the state, got .*'ro': 0"),
    "a short vector": ({"old_dirs": [VECTOR[1:]] * 7}, r"'old_dirs\[0\]' must be a dense vector of 66 .*\(65,\)"),
    "a matrix": ({"d": VECTOR.view(6, 11)}, r"'d' must be a dense vector of 66 .*\(6, 11\)"),
    "no tensor": ({"prev_flat_grad": [1.0] * 66}, r"'prev_flat_grad' must be a dense vector .* of type list"),
    "complex": ({"d": VECTOR.to(torch.complex128)}, "'d' must be a dense vector of 66 real .*complex128"),
    "on no device": ({"d": VECTOR.to("meta")}, "'d' must be a dense vector of 66 .* on meta"),
    "sparse": ({"d": VECTOR.to_sparse()}, "'d' must be a dense vector of 66"),
    "a string": ({"old_stps": "abcdefg"}, "'old_stps' must be a list, got 'abcdefg'"),
    "a string for a number": ({"t": "1"}, "'t' must be a number or a tensor of one element, got '1'"),
    "strings among numbers": ({"ro": ["1"] * 7}, r"'ro\[0\]' must be a number .* got '1'"),
    "two numbers for one": ({"H_diag": VECTOR[:2]}, r"'H_diag' must be a number .* shape \(2,\)"),
    "a negative count": ({"n_iter": -1}, "'n_iter' must be a count, at least 0, got -1"),
    "half a count": ({"func_evals": 1.5}, "'func_evals' must be a count, at least 0, got 1.5"),
    "nothing": ({"d": None}, "expected 'd' in the state after 8 iterations, got None"),
}


def trained(compiled: bool) -> Run:
    run, _ = pair(network, compiled, max_iter=4)
    run.step(2)
    return run


@both
@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_checkpoint_changes_nothing(case: str, compiled: bool) -> None:
    run = trained(compiled)
    changes, message = MALFORMED[case]
    checkpoint = copy.deepcopy(run.optimizer.state_dict())
    checkpoint["state"][0].update(changes)
    before = everything(run)
    with pytest.raises(ValueError, match=f"LBFGS: .*{message}"):
        run.optimizer.load_state_dict(checkpoint)
    assert_unchanged(run, before)
    run.step()


LAYOUTS: dict[str, tuple[Any, str]] = {
    "a string": ("weights", "the checkpoint must be a dict, got 'weights'"),
    "nothing": (None, "the checkpoint must be a dict, got None"),
    "no state": ({"param_groups": []}, "expected 'state' in the checkpoint"),
    "no param group": ({"state": {}, "param_groups": []}, r"must be a list of one dict, got \[\]"),
    "no dict": ({"state": {}, "param_groups": ["lr"]}, "param group of the checkpoint must be a dict, got 'lr'"),
    "no options": ({"state": {}, "param_groups": [{"params": [0]}]}, "expected the option 'lr' in the param group"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_is_no_checkpoint_changes_nothing(case: str) -> None:
    run = trained(compiled=False)
    before = everything(run)
    checkpoint, message = LAYOUTS[case]
    with pytest.raises(ValueError, match=f"LBFGS: .*{message}"):
        run.optimizer.load_state_dict(checkpoint)
    assert_unchanged(run, before)


@both
@pytest.mark.parametrize("case", ["no tensor", "a matrix", "a string for a number", "a negative count", "nothing"])
def test_a_step_from_malformed_state_changes_nothing(case: str, compiled: bool) -> None:
    run = trained(compiled)
    changes, message = MALFORMED[case]
    state = run.optimizer.state[run.params[0]]
    kept = dict(state)
    state.update(changes)
    before = everything(run)
    with pytest.raises(ValueError, match=f"LBFGS: .*{message}"):
        run.step()
    assert_unchanged(run, before)
    run.optimizer.state[run.params[0]].update(kept)
    run.step()


OPTIONS: dict[str, tuple[Any, type[Exception], str]] = {
    "history_size": (0, ValueError, "history_size must be at least 1, got 0"),
    "lr": (float("nan"), ValueError, "lr must be at least 0, got nan"),
    "max_iter": ("many", TypeError, "max_iter must be at least 0, got 'many'"),
    "line_search_fn": ("armijo", RuntimeError, "line_search_fn must be None or 'strong_wolfe', got 'armijo'"),
}


@both
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changed_to_nonsense_changes_nothing(name: str, compiled: bool) -> None:
    run = trained(compiled)
    value, error, message = OPTIONS[name]
    checkpoint = copy.deepcopy(run.optimizer.state_dict())
    checkpoint["param_groups"][0][name] = value
    before = everything(run)
    with pytest.raises(error, match=message):
        run.optimizer.load_state_dict(checkpoint)
    assert_unchanged(run, before)
    run.optimizer.param_groups[0][name] = value
    before = everything(run)
    with pytest.raises(error, match=message):
        run.step()
    assert_unchanged(run, before)


@both
@pytest.mark.parametrize("name", ["d", "prev_flat_grad"])
def test_a_vector_whose_memory_was_taken_away(name: str, compiled: bool) -> None:
    run = trained(compiled)
    run.optimizer.state[run.params[0]][name].untyped_storage().resize_(8)
    values = [p.detach().clone() for p in run.params]
    with pytest.raises(ValueError, match=f"LBFGS: state '{name}' must be a vector of 66 elements in memory"):
        run.step()
    torch.testing.assert_close(run.values, values, rtol=0, atol=0)


def test_a_history_whose_memory_was_taken_away() -> None:
    run = trained(compiled=True)
    for ring in ("y", "alphas"):
        getattr(run.optimizer.state[run.params[0]]["history"], ring).untyped_storage().resize_(8)
        with pytest.raises(ValueError, match="the memory of the history was replaced or resized"):
            run.step()


@both
def test_vectors_of_another_kind_are_taken_over(compiled: bool) -> None:
    run, other = trained(compiled), trained(compiled)
    state = run.optimizer.state[run.params[0]]
    state["d"] = torch.stack([state["d"], state["d"]], 1)[:, 0]
    state["prev_flat_grad"] = torch.nn.Parameter(state["prev_flat_grad"].clone())
    assert run.step(2) == other.step(2)
    assert_alike(run, other, 0)


@both
def test_parameters_that_change_their_dtype(compiled: bool) -> None:
    run = trained(compiled)
    for p in run.params:
        p.data, p.grad = p.data.float(), None
    losses = run.step(3)
    assert losses[-1] < losses[0]
    assert run.optimizer.state[run.params[0]]["history"].y.dtype == torch.float32


@both
def test_gradients_that_are_no_gradients(compiled: bool) -> None:
    ours, _ = pair(least_squares, compiled)
    p = ours.params[0]

    def closure() -> Any:
        p.grad = torch.ones(12, dtype=torch.float64)
        p.data = p.data[:5]
        return torch.zeros(())

    with pytest.raises(ValueError, match=r"expected a gradient of shape \(5,\), got \(12,\)"):
        ours.optimizer.step(closure)
    assert not ours.optimizer.state


@both
def test_without_parameters_there_is_only_the_loss(compiled: bool) -> None:
    assert LBFGS([{"params": []}], compiled=compiled).step(lambda: 5.0) == 5.0
