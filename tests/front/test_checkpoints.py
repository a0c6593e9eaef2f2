"""Checkpoints, copies and pickles: torch.optim's format in both directions, mid-training, and steps that fail."""

from __future__ import annotations

import copy
import inspect
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import assert_equal, both, parameters, train
from cases import ALL, CLASSES, IDS, KINDS, named, numbers_of, oracle, rich_options, tolerance
from frozen import assert_frozen, frozen, through_a_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from compiled_optim import SGD, Adam, AdamW, CompileError, Optimizer, cache_clear, cache_info, explain

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)


def layout(optimizer: torch.optim.Optimizer) -> Any:
    """Keys, types, shapes and dtypes of the state, and the keys of the groups."""

    def describe(value: Any) -> Any:
        return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)

    saved = optimizer.state_dict()
    state = {i: {k: describe(v) for k, v in s.items()} for i, s in saved["state"].items()}
    return state, [set(group) for group in saved["param_groups"]]


# ---- to torch and back


def there_and_back(cls: type[Optimizer], options: dict[str, Any], compiled: bool) -> None:
    ours, stock = parameters(2)
    mine, theirs = cls(ours, **options, compiled=compiled), oracle(cls)(stock, **options)
    train(3, (mine, ours), (theirs, stock))
    assert layout(mine) == layout(theirs)

    # each side continues from what the other wrote
    mine_next, theirs_next = cls(ours, compiled=compiled), oracle(cls)(stock)
    mine_next.load_state_dict(through_a_file(theirs.state_dict()))
    theirs_next.load_state_dict(through_a_file(mine.state_dict()))
    assert mine_next.state_dict()["param_groups"] == theirs_next.state_dict()["param_groups"]
    train(3, (mine_next, ours), (theirs_next, stock))
    assert_equal(ours, stock, tolerance(cls))
    assert layout(mine_next) == layout(theirs)  # torch casts what is carried to the dtype of the parameter on loading

    last = cls(ours, compiled=compiled)
    last.load_state_dict(through_a_file(theirs_next.state_dict()))
    train(3, (last, ours), (theirs_next, stock))
    assert_equal(ours, stock, tolerance(cls))
    states = last.state_dict()["state"], theirs_next.state_dict()["state"]
    torch.testing.assert_close(*states, rtol=max(1e-9, tolerance(cls)), atol=1e-12, check_dtype=False)
    assert {row.execution for row in explain(last)} == {"multi_tensor" if compiled else "eager"}


@pytest.mark.parametrize(("cls", "options"), ALL, ids=IDS)
def test_checkpoints_of_torch_and_back(cls: type[Optimizer], options: dict[str, Any]) -> None:
    there_and_back(cls, options, compiled=False)


@every_class
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_checkpoints_of_torch_and_back_compiled(cls: type[Optimizer], default: torch.dtype) -> None:
    torch.set_default_dtype(default)  # of it are the step count and what is carried
    for options in ({}, rich_options(cls)):
        there_and_back(cls, options, compiled=True)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_state_is_laid_out_as_in_torch(compiled: bool, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)  # of it is the step count
    for cls, options in (*((cls, rich_options(cls)) for cls in CLASSES), (AdamW, {"fused": True})):
        ours, stock = parameters(2)
        mine, theirs = cls(ours, **options, compiled=compiled), oracle(cls)(stock, **options)
        assert layout(mine) == layout(theirs)
        train(1, (mine, ours), (theirs, stock))
        assert layout(mine) == layout(theirs)


# ---- what a checkpoint may say, or not


@both
def test_a_checkpoint_does_not_decide_whether_to_compile(compiled: bool) -> None:
    ours, stock = parameters(2)
    theirs = torch.optim.AdamW(stock, fused=True)
    train(1, (theirs, stock))
    mine = AdamW(ours, compiled=compiled)
    mine.load_state_dict(theirs.state_dict())
    train(1, (mine, ours))
    assert {row.execution for row in explain(mine)} == {"multi_tensor" if compiled else "eager"}
    fused = AdamW(ours, fused=True)
    fused.load_state_dict(torch.optim.AdamW(stock, foreach=True).state_dict())
    train(1, (fused, ours))
    assert {row.execution for row in explain(fused)} == {"multi_tensor"}


@every_class
def test_no_key_of_ours_is_in_a_checkpoint(cls: type[Optimizer]) -> None:
    ours, stock = parameters(2)
    mine = cls(ours, compiled=True)
    torch.testing.assert_close(mine.state_dict(), oracle(cls)(stock).state_dict(), rtol=0, atol=0)
    assert "compiled" not in mine.defaults


@every_class
def test_flags_that_a_checkpoint_lacks_get_their_defaults(cls: type[Optimizer]) -> None:
    """As in a checkpoint of an older torch."""
    ours, stock = parameters(2)
    theirs = oracle(cls)(stock)
    train(2, (theirs, stock))
    saved = copy.deepcopy(theirs.state_dict())
    flags = [k for k, v in saved["param_groups"][0].items() if isinstance(v, bool) or v is None]
    switch = "maximize" if "maximize" in flags else next(k for k in flags if cls.rule.declaration.options[k].switch)
    for flag in flags:
        del saved["param_groups"][0][flag]
    mine = cls(ours, **{switch: not theirs.param_groups[0][switch]})
    mine.load_state_dict(saved)
    assert {k: mine.param_groups[0][k] for k in flags} == {k: theirs.param_groups[0][k] for k in flags}
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(stock), ours)
    train(2, (mine, ours), (theirs, stock))
    assert_equal(ours, stock, tolerance(cls))


@both
@pytest.mark.parametrize("saved_as", ["float", "tensor"])
def test_a_tensor_learning_rate_stays_the_tensor_it_is(compiled: bool, saved_as: str) -> None:
    ours, stock = parameters(2)
    theirs = torch.optim.AdamW(stock, lr=0.25 if saved_as == "float" else torch.tensor(0.25))
    lr = torch.tensor(0.5)
    mine = AdamW(ours, lr=lr, compiled=compiled)
    train(1, (mine, ours))
    mine.load_state_dict(through_a_file(theirs.state_dict()))
    assert mine.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25
    lr.fill_(0.0)
    before = [p.detach().clone() for p in ours]
    train(1, (mine, ours))
    assert_equal(ours, before, atol=0)
    assert theirs.param_groups[0]["lr"] == 0.25


@both
def test_a_float_learning_rate_takes_the_tensor_that_was_saved(compiled: bool) -> None:
    ours, stock = parameters(2)
    theirs = torch.optim.AdamW(stock, lr=torch.tensor(0.25))
    mine = AdamW(ours, lr=0.5, compiled=compiled)
    mine.load_state_dict(theirs.state_dict())
    assert mine.param_groups[0]["lr"] == 0.25
    assert mine.param_groups[0]["lr"] is not theirs.param_groups[0]["lr"]
    train(2, (mine, ours))


@both
@pytest.mark.parametrize("number", [3, 3.0])
def test_step_counts_that_are_python_numbers(compiled: bool, number: float) -> None:
    ours, stock = parameters(2)
    theirs = torch.optim.Adam(stock)
    train(3, (theirs, stock))
    saved = copy.deepcopy(theirs.state_dict())
    for state in saved["state"].values():
        state["step"] = number
    mine = Adam(ours, compiled=compiled)
    mine.load_state_dict(saved)
    assert_equal([s["step"] for s in mine.state.values()], [torch.tensor(3.0)] * 3)
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(stock), ours)
    train(3, (mine, ours), (theirs, stock))
    assert_equal(ours, stock)
    assert layout(mine) == layout(theirs)


@both
def test_a_momentum_buffer_of_none(compiled: bool) -> None:
    """Written by a stock SGD whose parameter never had a gradient, or with momentum 0 in older versions."""
    ours, stock = parameters(2)
    mine = SGD(ours, lr=0.1, momentum=0.9, dampening=0.5, compiled=compiled)
    theirs = torch.optim.SGD(stock, lr=0.1, momentum=0.9, dampening=0.5)
    saved = theirs.state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for i in range(len(stock))}
    for optimizer in (mine, theirs):
        optimizer.load_state_dict(through_a_file(saved))
    train(3, (mine, ours), (theirs, stock))
    assert_equal(ours, stock)
    assert layout(mine) == layout(theirs)


# ---- copies


def pickled(optimizer: Optimizer, params: list[Any]) -> tuple[Optimizer, list[Any]]:
    result: tuple[Optimizer, list[Any]] = pickle.loads(pickle.dumps((optimizer, params)))
    return result


def deep_copied(optimizer: Optimizer, params: list[Any]) -> tuple[Optimizer, list[Any]]:
    return copy.deepcopy((optimizer, params))


COPIED = [(cls, o) for cls in CLASSES for o in ({"compiled": True}, {"compiled": False}, {"fused": True})
          if o.keys() <= inspect.signature(cls).parameters.keys()]  # fmt: skip


@pytest.mark.parametrize("duplicate", [pickled, deep_copied])
@pytest.mark.parametrize(("cls", "options"), COPIED, ids=[f"{cls.__name__}-{named(o)}" for cls, o in COPIED])
def test_copies_continue_alike(cls: type[Optimizer], options: dict[str, Any], duplicate: Callable[..., Any]) -> None:
    params = parameters()
    first = cls(params, **options)
    train(2, (first, params))
    before = cache_info()
    second, others = duplicate(first, params)
    train(3, (first, params), (second, others))
    assert_equal(others, params, atol=0)
    assert cache_info()._replace(hits=0) == before._replace(hits=0)
    assert [row.execution for row in explain(second)] == [row.execution for row in explain(first)]
    assert hasattr(second, "_step_supports_amp_scaling") == ("fused" in options)
    # and share nothing
    kept, state = [p.detach().clone() for p in params], copy.deepcopy(first.state_dict())
    train(1, (second, others))
    assert_equal(params, kept, atol=0)
    torch.testing.assert_close(first.state_dict()["state"], state["state"], rtol=0, atol=0)


@both
def test_a_shallow_copy_shares_parameters_and_state(compiled: bool) -> None:
    ours, stock = parameters(2)
    mine, theirs = AdamW(ours, compiled=compiled), torch.optim.AdamW(stock)
    train(2, (mine, ours), (theirs, stock))
    twin = copy.copy(mine)
    assert twin.state is mine.state
    for optimizer in (twin, mine):
        train(1, (optimizer, ours), (theirs, stock))
    assert_equal(ours, stock)


def test_nothing_of_the_running_process_travels() -> None:
    params = parameters()
    fresh = AdamW(params, compiled=True)
    keys = set(fresh.__getstate__())
    train(2, (fresh, params))
    assert set(fresh.__getstate__()) == keys
    assert {"defaults", "state", "param_groups"} <= keys
    data = pickle.dumps(fresh)
    names = {op[1] for op in pickletools.genops(data) if isinstance(op[1], str)}
    assert not any(
        word in name for name in names for word in ("plan", "Plan", "kernels", "ctypes", "execution.", "address")
    )
    assert fresh._execution is not None
    assert pickle.loads(data)._execution is None


# ---- the distributed checkpoint


@both
@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.accepts_dense], ids=lambda c: c.__name__)
def test_the_distributed_checkpoint(cls: type[Optimizer], compiled: bool) -> None:
    """It makes the state of a fresh optimizer by a real step with zero gradients and learning rate 0."""
    models = [torch.nn.Linear(3, 2, bias=not cls.matrices_only, dtype=torch.float64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    runs = [(made(m.parameters(), lr=0.1, **o), list(m.parameters())) for made, m, o in
            ((cls, models[0], {"compiled": compiled}), (oracle(cls), models[1], {}))]  # fmt: skip
    before = [p.detach().clone() for p in runs[0][1]]
    saved = [get_optimizer_state_dict(m, o) for m, (o, _) in zip(models, runs, strict=True)]
    assert_equal(runs[0][1], before, atol=0)
    torch.testing.assert_close(saved[0]["state"], saved[1]["state"], rtol=0, atol=0)
    assert layout(runs[0][0]) == layout(runs[1][0])
    train(2, *runs)
    assert_equal(runs[0][1], runs[1][1], tolerance(cls))
    # and back into a fresh one
    saved[1] = copy.deepcopy(get_optimizer_state_dict(models[1], runs[1][0]))
    fresh = cls(models[0].parameters(), lr=0.5, compiled=compiled)
    set_optimizer_state_dict(models[0], fresh, saved[1])
    assert fresh.param_groups[0]["lr"] == 0.1
    train(2, (fresh, runs[0][1]), runs[1])
    assert_equal(runs[0][1], runs[1][1], tolerance(cls))


# ---- steps that fail


def failing_closure() -> float:
    raise KeyboardInterrupt


BROKEN = [(cls, name, value) for cls in KINDS for name in numbers_of(cls) for value in ("x", None)]
BROKEN += [(cls, "betas", (1.0, 1.0)) for cls in CLASSES if "betas" in numbers_of(cls)]  # divides by zero


@both
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("cls", "name", "value"), BROKEN, ids=[f"{c.__name__}-{n}-{v}" for c, n, v in BROKEN])
def test_a_bad_hyperparameter_leaves_everything_untouched(
    cls: type[Optimizer], name: str, value: Any, compiled: bool, trained: bool
) -> None:
    params = parameters()
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}], compiled=compiled)
    train(int(trained), (optimizer, params))
    before = frozen(optimizer, params)
    good = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    with pytest.raises((TypeError, ValueError, ZeroDivisionError)):
        train(1, (optimizer, params))
    assert_frozen(optimizer, params, before)
    optimizer.param_groups[1][name] = good
    train(1, (optimizer, params))
    with pytest.raises(AssertionError):
        assert_frozen(optimizer, params, before)


@both
@pytest.mark.parametrize("trained", [False, True])
def test_a_failing_closure_leaves_everything_untouched(compiled: bool, trained: bool) -> None:
    params = parameters()
    optimizer = AdamW(params, compiled=compiled)
    train(int(trained), (optimizer, params))
    before = frozen(optimizer, params)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing_closure)
    assert_frozen(optimizer, params, before)


def test_a_kernel_that_cannot_be_compiled_leaves_everything_untouched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    params = parameters()
    optimizer = Adam(params, compiled=True)
    before = frozen(optimizer, params)
    cache_clear()
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    monkeypatch.setenv("COMPILED_OPTIM_CACHE_DIR", str(tmp_path))
    with pytest.raises(CompileError, match="no C\\+\\+ compiler"):
        train(1, (optimizer, params))
    assert_frozen(optimizer, params, before)
    monkeypatch.undo()
    monkeypatch.setenv("COMPILED_OPTIM_STRICT", "1")
    train(1, (optimizer, params))
    assert {row.execution for row in explain(optimizer)} == {"multi_tensor"}
