"""LBFGS beside torch.optim.LBFGS: the same iterates, exits, calls of the closure, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_torch import both, executions
from minimizing import PROBLEMS, Loss, Run, assert_alike, initial, least_squares, network, pair, rosenbrock, waves

from compiled_optim import LBFGS

searches = pytest.mark.parametrize("search", [None, "strong_wolfe"])


def assert_same_course(ours: Run, theirs: Run, steps: int = 3, atol: float = 1e-10) -> None:
    """Eager steps are torch's operations in torch's order, so they agree exactly."""
    atol = atol if ours.optimizer._compiled else 0
    for _ in range(steps):
        assert ours.step() == pytest.approx(theirs.step(), rel=atol, abs=atol, nan_ok=True)
        assert_alike(ours, theirs, atol)
        mine, stock = (run.optimizer.state_dict()["state"][0] for run in (ours, theirs))
        for name in ("func_evals", "n_iter"):
            assert mine[name] == stock[name]
        assert len(mine.get("old_dirs") or ()) == len(stock.get("old_dirs") or ())
    assert set(executions(ours.optimizer)) == {"lbfgs" if ours.optimizer._compiled else "eager"}


@both
@searches
@pytest.mark.parametrize("history_size", [4, 100])
@pytest.mark.parametrize("loss", PROBLEMS, ids=lambda f: f.__name__)
def test_iterates_are_those_of_torch(loss: Loss, history_size: int, search: str | None, compiled: bool) -> None:
    options = {"max_iter": 7, "history_size": history_size, "line_search_fn": search}
    assert_same_course(*pair(loss, compiled, **options))


@both
@pytest.mark.parametrize("history_size", [2, 50])
def test_pairs_without_curvature_are_rejected(history_size: int, compiled: bool) -> None:
    """Near 0 the loss is concave. A ring that is full loses no pair to one that is rejected."""
    ours, theirs = pair(waves, compiled, [0.01 * v for v in initial(waves)], max_iter=1, history_size=history_size)
    kept = []
    for _ in range(30):
        assert_same_course(ours, theirs, 1)
        kept.append(len(ours.optimizer.state_dict()["state"][0]["ro"]))
    assert kept[4] == 0
    assert kept[-1] == (2 if history_size == 2 else 17)


EXITS: dict[str, dict[str, Any]] = {
    "the gradient at once": {"tolerance_grad": 1e3},
    "the gradient later": {"tolerance_grad": 0.05, "max_iter": 30},
    "the change of parameters": {"tolerance_change": 1e-3, "max_iter": 100},
    "the directional derivative": {"tolerance_change": 1e3},
    "evaluations": {"max_eval": 5, "max_iter": 30},
    "one evaluation": {"max_eval": 1},
    "one iteration": {"max_iter": 1},
    "no iteration": {"max_iter": 0},
    "a history of one": {"history_size": 1, "max_iter": 9},
    "tolerances that are never met": {"tolerance_grad": -1, "tolerance_change": -1, "max_iter": 4},
}


@both
@searches
@pytest.mark.parametrize("exit", EXITS)
def test_a_step_ends_when_it_does_with_torch(exit: str, search: str | None, compiled: bool) -> None:
    ours, theirs = pair(least_squares, compiled, line_search_fn=search, **EXITS[exit])
    assert_same_course(ours, theirs)


# ---- parameters and gradients


@both
@searches
def test_missing_and_sparse_gradients(search: str | None, compiled: bool) -> None:
    def loss(table: Any, unused: Any, x: Any) -> Any:
        rows = torch.nn.functional.embedding(torch.tensor([0, 2, 2]), table, sparse=True)
        return (rows**2).sum() + ((x - 1) ** 2).sum()

    values = [torch.randn(4, 3), torch.randn(2), torch.randn(3)]
    options = {"lr": 0.5, "max_iter": 4, "line_search_fn": search}
    assert_same_course(*pair(loss, compiled, [v.double() for v in values], **options))


@both
@searches
@pytest.mark.parametrize("conjugate", [False, True])
def test_complex_parameters(conjugate: bool, search: str | None, compiled: bool) -> None:
    target = torch.randn(3, 2, dtype=torch.complex128)

    def loss(z: Any, x: Any) -> Any:
        return ((z - target).abs() ** 4).sum() + (z * target).real.sum() + (x**4).sum()

    def conjugated(z: Any, x: Any) -> Any:  # its gradient is a lazily conjugated tensor, which torch.optim refuses
        return loss(z, x) if not conjugate else (z.conj() * target).real.sum() + 2 * (z.abs() ** 2).sum() + (x**2).sum()

    values = [torch.randn(3, 2, dtype=torch.complex128), torch.randn(2, dtype=torch.float64)]
    assert_same_course(*pair(conjugated, compiled, values, lr=0.1, max_iter=8, line_search_fn=search))


@both
@searches
def test_parameters_that_are_not_contiguous(search: str | None, compiled: bool) -> None:
    def loss(*params: Any) -> Any:
        return sum(((p - i) ** 2 * torch.arange(1.0, p.numel() + 1).view(p.shape)).sum() for i, p in enumerate(params))

    def transposed(params: list[Any]) -> list[Any]:
        for p in params:
            p.data = p.data.mT.contiguous().mT
        assert not params[0].is_contiguous()
        return params

    options = {"lr": 0.5, "max_iter": 6, "line_search_fn": search}
    values = [torch.randn(3, 4).double(), torch.randn(2, 2, 5).double()]
    ours = Run(loss, values, lambda params: LBFGS(transposed(params), compiled=compiled, **options))
    theirs = Run(loss, values, lambda params: torch.optim.LBFGS(params, **options))  # torch.optim refuses the former
    for _ in range(3):  # not exactly the same: the loss sums in another order
        ours.step()
        theirs.step()
        assert_alike(ours, theirs)


@both
@searches
def test_float32(search: str | None, compiled: bool) -> None:
    ours, theirs = pair(network, compiled, initial(network, torch.float32), max_iter=10, line_search_fn=search)
    assert_same_course(ours, theirs, steps=2, atol=1e-3)


@both
def test_parameters_of_two_dtypes(compiled: bool) -> None:
    ours, theirs = pair(
        lambda x, y: ((x - 1) ** 4).sum() + ((y + x.double()) ** 2).sum(),
        compiled,
        [torch.randn(3), torch.randn(3).double()],
        lr=0.1,
    )
    assert_same_course(ours, theirs, 1, atol=1e-6)  # the iterates are rounded to float32


@both
def test_long_vectors(compiled: bool) -> None:
    """Several threads, and more than one block of a sum."""
    values = [torch.sin(torch.arange(30_001.0)).double()]
    ours, theirs = pair(rosenbrock, compiled, values, line_search_fn="strong_wolfe", history_size=7)
    assert_same_course(ours, theirs, 1)


@both
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_infinity_go_where_torch_lets_them(poison: float, compiled: bool) -> None:
    calls = {"ours": 0, "theirs": 0}
    ours, theirs = pair(least_squares, compiled, max_iter=6)
    for name, run in (("ours", ours), ("theirs", theirs)):

        def loss(x: Any, name: str = name) -> Any:
            calls[name] += 1
            return least_squares(x) + (x[3] * poison if calls[name] > 3 else 0)

        run.loss = loss
    assert_same_course(ours, theirs, 2)
    assert calls["ours"] == calls["theirs"]


# ---- the closure, hooks, and what surrounds a step


@both
@searches
def test_the_closure_runs_with_gradients_and_the_first_loss_is_returned(search: str | None, compiled: bool) -> None:
    run, _ = pair(rosenbrock, compiled, line_search_fn=search)
    losses: list[Any] = []

    def closure() -> Any:
        assert torch.is_grad_enabled()
        losses.append(run.closure())
        return losses[-1]

    with torch.no_grad():
        assert run.optimizer.step(closure) is losses[0]
    assert len(losses) > 1


@both
@searches
@pytest.mark.parametrize("call", [1, 2, 6])
def test_training_goes_on_after_a_closure_that_raised(call: int, search: str | None, compiled: bool) -> None:
    runs = pair(network, compiled, max_iter=8, line_search_fn=search)
    for run in runs:
        calls = 0

        def closure(run: Run = run) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyError("no data")
            return run.closure()

        with pytest.raises(KeyError):
            run.optimizer.step(closure)
    run, stock = runs
    assert_alike(run, stock)
    before = run.step(6)
    assert before[-1] < before[0]
    assert len(run.optimizer.state_dict()["state"][0]["old_dirs"]) > 5


@both
@pytest.mark.parametrize("overridden", [False, True])
def test_hooks_fire_once_and_the_profiler_sees_a_step(overridden: bool, compiled: bool) -> None:
    class Derived(LBFGS):
        def step(self, closure: Any) -> Any:
            return super().step(closure)

    run = Run(
        rosenbrock, initial(rosenbrock), lambda params: (Derived if overridden else LBFGS)(params, compiled=compiled)
    )
    events: list[str] = []
    run.optimizer.register_step_pre_hook(lambda *_: events.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: events.append("after"))
    with torch.profiler.profile(acc_events=True) as profile:
        run.optimizer.step(lambda: events.append("loss") or run.closure())
    assert (events[0], events[-1], events.count("before"), events.count("after")) == ("before", "after", 1, 1)
    name = "Derived" if overridden else "LBFGS"
    assert [e.count for e in profile.key_averages() if e.key == f"Optimizer.step#{name}.step"] == [1]


@both
def test_schedulers_and_a_tensor_learning_rate(compiled: bool) -> None:
    ours, theirs = pair(network, compiled, max_iter=4, lr=0.3)
    tensors, _ = pair(network, compiled, max_iter=4, lr=torch.tensor([0.3], dtype=torch.float64))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5) for run in (ours, theirs, tensors)]
    for _ in range(4):
        for run, scheduler in zip((ours, theirs, tensors), schedulers, strict=True):
            run.step()
            scheduler.step()
    assert_alike(ours, theirs)
    assert_alike(tensors, theirs)


def test_a_step_inside_a_compiled_function() -> None:
    ours, theirs = pair(rosenbrock, compiled=True, max_iter=5)
    train = torch.compile(lambda: ours.optimizer.step(ours.closure), backend="eager")
    train()
    theirs.step()
    assert_alike(ours, theirs)
    assert executions(ours.optimizer) == {"lbfgs": ""}


# ---- arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "LBFGS: lr must be at least 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "LBFGS: lr must be at least 0, got nan"),
        ({"lr": torch.ones(2)}, ValueError, r"LBFGS: lr must be a number or a tensor of one element, got shape \(2,\)"),
        ({"lr": "fast"}, TypeError, "LBFGS: lr must be at least 0, got 'fast' of type str"),
        ({"tolerance_grad": None}, TypeError, "LBFGS: tolerance_grad must be a number, got None"),
        ({"history_size": 2.5}, TypeError, "LBFGS: history_size must be a whole number, got 2.5"),
        ({"max_iter": -1}, ValueError, "LBFGS: max_iter must be at least 0, got -1"),
        ({"max_eval": -3}, ValueError, "LBFGS: max_eval must be at least 0, got -3"),
        ({"history_size": 0}, ValueError, "LBFGS: history_size must be at least 1, got 0"),
        ({"line_search_fn": "armijo"}, RuntimeError, "line_search_fn must be None or 'strong_wolfe', got 'armijo'"),
        ({"compiled": "foreach"}, ValueError, "LBFGS: compiled must be False or True, got 'foreach'"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LBFGS([torch.nn.Parameter(torch.ones(2))], **options)


def test_one_param_group_and_the_options_of_torch() -> None:
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(ValueError, match="LBFGS: expected one param group"):
        LBFGS([{"params": [p]}, {"params": [q]}])
    ours, theirs = (make([("p", p)], 0.5, 8, None, 1e-6, 1e-8, 9, None) for make in (LBFGS, torch.optim.LBFGS))
    assert ours.param_groups == theirs.param_groups
    assert isinstance(ours, torch.optim.LBFGS)
    with pytest.raises(ValueError, match="LBFGS: expected one param group"):
        ours.add_param_group({"params": [q]})


def test_the_history_may_be_resized() -> None:
    ours, _ = pair(network, compiled=True, max_iter=10, history_size=8)
    before = ours.step()
    for size in (3, 20):
        ours.optimizer.param_groups[0]["history_size"] = size
        ours.step()
        assert len(ours.optimizer.state_dict()["state"][0]["ro"]) <= size
    assert ours.step() < before
