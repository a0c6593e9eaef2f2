"""Closures, and the hooks of ``step`` and of ``state_dict``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_torch import MATRICES, assert_equal, both, executions, parameters, set_gradients
from cases import CLASSES
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from compiled_optim import SGD, AdamW

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)


# ---- closures


@both
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_makes_the_gradients(compiled: bool, by_keyword: bool) -> None:
    ours, stock = parameters(2)
    mine, theirs = SGD(ours, lr=0.1, compiled=compiled), torch.optim.SGD(stock, lr=0.1)
    seen: list[tuple[bool, list[Any]]] = []

    def closure_of(optimizer: torch.optim.Optimizer, params: list[Any]) -> Any:
        def closure() -> torch.Tensor:
            seen.append((torch.is_grad_enabled(), [p.grad for p in params]))
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        return closure

    with torch.no_grad():
        for optimizer, params in ((mine, ours), (theirs, stock)):
            closure = closure_of(optimizer, params)
            loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
            assert isinstance(loss, torch.Tensor)
            assert loss.requires_grad
    assert seen == [(True, [None] * len(MATRICES))] * 2
    assert_equal(ours, stock)
    assert set(executions(mine)) == {"multi_tensor" if compiled else "eager"}


# ---- hooks


@both
def test_step_hooks_see_optimizer_and_arguments(compiled: bool) -> None:
    params = parameters()
    set_gradients(params)
    optimizer = SGD(params, lr=0.1, compiled=compiled)
    before = params[0].detach().clone()
    calls: list[tuple[str, Any, Any, Any, bool]] = []

    def recorder(name: str) -> Any:
        def hook(opt: Any, args: Any, kwargs: Any) -> None:
            calls.append((name, opt, args[1:], kwargs, torch.equal(params[0], before)))

        return hook

    handles = [
        register_optimizer_step_pre_hook(recorder("global pre")),
        optimizer.register_step_pre_hook(recorder("pre")),
        optimizer.register_step_post_hook(recorder("post")),
        register_optimizer_step_post_hook(recorder("global post")),
    ]

    def closure() -> float:
        return 5.0

    assert optimizer.step(closure=closure) == 5.0
    names = ["global pre", "pre", "post", "global post"]
    assert [(c[0], c[4]) for c in calls] == list(zip(names, [True, True, False, False], strict=True))
    assert all(c[1] is optimizer for c in calls)
    assert all(dict(c[3]) == {"closure": closure} or c[2] == (closure,) for c in calls)
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 4


@both
@pytest.mark.parametrize("keyword", [False, True])
def test_a_pre_hook_may_replace_the_closure(compiled: bool, keyword: bool) -> None:
    optimizer = SGD(parameters(), compiled=compiled)

    def hook(opt: Any, args: Any, kwargs: Any) -> Any:
        return ((opt,), {"closure": lambda: "replaced"}) if keyword else ((opt, lambda: "replaced"), {})

    optimizer.register_step_pre_hook(hook)
    assert optimizer.step(lambda: "given") == "replaced"
    assert optimizer.step() == "replaced"


def test_a_pre_hook_that_returns_nonsense_is_an_error() -> None:
    optimizer = SGD(parameters())
    optimizer.register_step_pre_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@both
def test_a_pre_hook_may_change_gradients_and_groups(compiled: bool) -> None:
    ours, stock = parameters(2)
    pair = [SGD(ours, lr=0.1, compiled=compiled), torch.optim.SGD(stock, lr=0.1)]

    def hook(opt: torch.optim.Optimizer, *_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 0.5)
        opt.param_groups[0]["lr"] *= 0.5
        opt.param_groups[0]["params"][1].grad = None

    for optimizer in pair:
        optimizer.register_step_pre_hook(hook)
    for _ in range(3):
        set_gradients(ours, stock)
        for optimizer in pair:
            optimizer.step()
    assert_equal(ours, stock)


def test_state_dict_hooks() -> None:
    params = parameters()
    optimizer = AdamW(params)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("save pre"))

    def mark(opt: Any, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append("save post")
        return {**saved, "mark": 1}

    def unmark(opt: Any, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append("load pre")
        assert saved.pop("mark") == 1
        saved["param_groups"][0]["lr"] = 7.0
        return saved

    optimizer.register_state_dict_post_hook(mark)
    optimizer.register_load_state_dict_pre_hook(unmark)
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append(f"load post {opt.param_groups[0]['lr']}"))
    saved = optimizer.state_dict()
    assert saved["mark"] == 1
    optimizer.load_state_dict(saved)
    assert calls == ["save pre", "save post", "load pre", "load post 7.0"]
    assert optimizer.param_groups[0]["lr"] == 7.0
