"""Updates of an average in one native call: whatever happened to the model or the average before one."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from averaging import AVERAGES, Net, assert_same_state, change
from torch import nn
from torch.optim import swa_utils as stock

from compiled_optim import CompileFallbackWarning
from compiled_optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from compiled_optim.swa_utils.launcher import Launcher

FUNCTIONS = {name: AVERAGES[name] for name in ("equal, avg_fn", "EMA", "custom")}


def weight(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((5, 4), value, dtype=torch.float64))


def share_memory(module: Any) -> None:
    memory = torch.arange(30.0, dtype=torch.float64)
    module.last.weight.data, module.first.weight.data = memory[:20].view(5, 4), memory[10:].view(4, 5)


def turn(parameter: Any) -> None:
    """The same values, laid out otherwise."""
    parameter.data = parameter.data.t().clone().t()


def assign(owner: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(owner, name, value)


def load(average: Any, part: str = "", **options: Any) -> None:
    saved = {name: value + 1 for name, value in average.state_dict().items() if part in name}
    average.load_state_dict(saved, **options)


TO_THE_MODEL: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: None,
    "a parameter is replaced": lambda m: assign(m.last, weight=weight(2)),
    "a parameter has other data": lambda m: assign(m.last.weight, data=weight(3).data),
    "a parameter is laid out otherwise": lambda m: turn(m.last.weight),
    "a parameter is an expanded number": lambda m: assign(m.last, weight=nn.Parameter(weight(1)[:1, :1].expand(5, 4))),
    "parameters share memory": share_memory,
    "a parameter is frozen": lambda m: m.last.requires_grad_(False),
    "a parameter is of another dtype": lambda m: assign(m.last, weight=nn.Parameter(weight(0.1).float())),
    "all are of another dtype": lambda m: m.float(),
    "a buffer is replaced": lambda m: assign(m.norm, running_mean=weight(7)[0].detach()),
    "a buffer has other data": lambda m: assign(m.norm.running_mean, data=weight(7)[0].detach()),
    "a buffer is an expanded number": lambda m: assign(m.norm, running_mean=weight(7)[0, 0].detach().expand(4)),
    "a buffer is of another dtype": lambda m: assign(m.norm, running_mean=torch.full((4,), 0.1)),
    "a buffer is a parameter's memory": lambda m: assign(m.norm, running_mean=m.norm.weight.detach()),
    "a module is replaced": lambda m: assign(m, last=nn.Linear(4, 5).double()),
}
TO_AN_AVERAGE: dict[str, Callable[[Any], Any]] = {
    "a parameter is replaced": lambda a: assign(a.module.last, weight=weight(4)),
    "a parameter has other data": lambda a: assign(a.module.last.weight, data=weight(5).data),
    "a parameter is laid out otherwise": lambda a: turn(a.module.last.weight),
    "parameters share memory": lambda a: share_memory(a.module),
    "all are frozen": lambda a: a.requires_grad_(False),
    "a buffer is replaced": lambda a: assign(a.module.norm, running_mean=torch.ones(4).double()),
    "the count is filled": lambda a: a.n_averaged.fill_(50),
    "the count is replaced": lambda a: assign(a, n_averaged=torch.tensor(70)),
    "the count is of another dtype": lambda a: assign(a, n_averaged=torch.tensor(70, dtype=torch.int32)),
    "the count begins anew": lambda a: a.n_averaged.zero_(),
    "its buffers are averaged": lambda a: assign(a, use_buffers=True),
    "it has another function": lambda a: assign(a, avg_fn=get_ema_avg_fn(0.25)),
    "it has a function of lists": lambda a: assign(a, avg_fn=None, multi_avg_fn=get_ema_multi_avg_fn(0.25)),
    "a checkpoint is loaded": load,
    "a checkpoint is assigned": lambda a: load(a, "last", strict=False, assign=True),
    "it was of another dtype": lambda a: a.float().double(),
    "it is of another dtype": lambda a: a.float(),
    "it is another module": lambda a: assign(a, module=copy.deepcopy(a.module)),
}
TO_BOTH: dict[str, Callable[[Any], Any]] = {
    "a buffer more": lambda m: m.register_buffer("late", torch.ones(2)),
    "a parameter more": lambda m: m.register_parameter("late", nn.Parameter(torch.ones(2).double())),
    "an empty parameter more": lambda m: m.register_parameter("late", nn.Parameter(torch.ones(0, 3))),
    "a complex parameter more": lambda m: m.register_parameter("late", nn.Parameter(torch.ones(3).double() * 1j)),
    "a module more": lambda m: m.add_module("late", nn.Linear(2, 2).double()),
    "a module less": lambda m: delattr(m, "last"),
    "a module twice": lambda m: m.add_module("late", m.last),
    "one more is tied": lambda m: assign(m.norm, bias=m.norm.weight),
    "one less is tied": lambda m: assign(m.tied, weight=nn.Parameter(m.tied.weight.detach().clone())),
}
TOGETHER: dict[str, Callable[[Any, Any], Any]] = {
    "a parameter is shared": lambda m, a: assign(a.module.last, weight=m.last.weight),
    "memory is shared": lambda m, a: assign(a.module.last.weight, data=m.last.weight.data),
    "a buffer is shared": lambda m, a: assign(a.module.norm, running_mean=m.norm.running_mean),
}
EVENTS: dict[str, Callable[[Any, list[Any]], Any]] = {
    **{f"model: {k}": lambda m, averages, f=f: f(m) for k, f in TO_THE_MODEL.items()},  # type: ignore[misc]
    **{f"average: {k}": lambda m, averages, f=f: [f(a) for a in averages] for k, f in TO_AN_AVERAGE.items()},  # type: ignore[misc]
    **{f"together: {k}": lambda m, averages, f=f: [f(m, a) for a in averages] for k, f in TOGETHER.items()},  # type: ignore[misc]
    **{
        f"both: {k}": lambda m, averages, f=f: [
            torch.manual_seed(1) and f(x) for x in (m, *(a.module for a in averages))
        ]  # type: ignore[misc]
        for k, f in TO_BOTH.items()
    },
}


@pytest.mark.parametrize("event", EVENTS)
def test_an_update_after(event: str, lenient: None) -> None:
    for theirs, ours in FUNCTIONS.values():
        torch.manual_seed(0)
        model = Net().double()
        averages: list[Any] = [stock.AveragedModel(model, **theirs), AveragedModel(model, **ours, compiled=True)]
        for i in range(7):
            if i < 4 or not ("memory" in event or "expanded" in event):
                change(model)
            if i == 4:
                EVENTS[event](model, averages)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CompileFallbackWarning)
                for average in averages:
                    average.update_parameters(model)
            precise = not any(p.dtype is torch.float32 for p in (*model.parameters(), *averages[0].parameters()))
            assert_same_state(averages[1], averages[0], 1e-12 if precise else 1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_else_runs(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    average = AveragedModel(model, **FUNCTIONS[function][1], compiled=True)
    for _ in range(3):
        average.update_parameters(model)
    monkeypatch.setattr(Launcher, "run", None)
    versions = [t._version for t in average.state_dict().values()]
    average.update_parameters(model)
    assert [t._version for t in average.state_dict().values()] == [v + 1 for v in versions]
    with pytest.raises(TypeError, match="not callable"):
        average.update_parameters(copy.deepcopy(model))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "pickle"])
def test_a_copy_is_an_average_of_its_own(make: Callable[[Any], Any]) -> None:
    model = Net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), compiled=True)
    for _ in range(3):
        average.update_parameters(model)
    before, other = copy.deepcopy(average.state_dict()), make(average)
    change(model)
    other.update_parameters(model)
    assert_same_state(average, before, 0)
    average.update_parameters(model)
    assert_same_state(average, other, 0)


def test_a_model_is_not_kept_alive() -> None:
    model = Net()
    average = AveragedModel(model, compiled=True)
    for _ in range(3):
        average.update_parameters(model)
    gone = weakref.ref(model.last.weight)
    del model
    gc.collect()
    assert gone() is None


def test_compiling_can_be_switched_off_between_two_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net().double()
    average, reference = AveragedModel(model, compiled=True), stock.AveragedModel(model)
    for i in range(6):
        change(model)
        if i == 3:
            monkeypatch.setenv("COMPILED_OPTIM_DISABLE", "1")
            monkeypatch.setattr(Launcher, "run", None)
        average.update_parameters(model)
        reference.update_parameters(model)
    assert_same_state(average, reference)


@pytest.mark.parametrize("whose", ["the model", "its average"])
@pytest.mark.parametrize("kind", ["last.weight", "norm.running_mean"])
def test_memory_that_is_gone(whose: str, kind: str) -> None:
    model = Net()
    average = AveragedModel(model, compiled=True)
    for _ in range(3):
        average.update_parameters(model)
    change(model)
    tensor = (model if whose == "the model" else average.module).state_dict()[kind]
    tensor.untyped_storage().resize_(0)
    before = {name: t for name, t in copy.deepcopy(average.state_dict()).items() if name != f"module.{kind}"}
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"'{kind}', of shape .* in {whose} .*its storage has 0"):
            average.update_parameters(model)
    assert all(t.equal(average.state_dict()[name]) for name, t in before.items())


def test_a_decay_that_updates_the_average() -> None:
    """From within an update, which has written nothing yet."""
    model = Net().double()

    def decay(n: int) -> float:
        if n == 5 and not nested:
            nested.append(n)
            average.update_parameters(model)
        return 0.5

    nested: list[int] = []
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), compiled=True)
    reference = stock.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for i in range(8):
        change(model)
        average.update_parameters(model)
        for _ in range(2 if i == 5 else 1):
            reference.update_parameters(model)
    assert_same_state(average, reference)


def test_threads() -> None:
    """Each update is whole, whatever thread takes it."""
    model = Net().double()
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5), compiled=True)
    for _ in range(3):
        average.update_parameters(model)
    change(model)
    threads = [threading.Thread(target=lambda: [average.update_parameters(model) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert average.n_averaged == 203
    assert_same_state(average.module, model)
