"""What is told of a step, and how often: warnings, the log, ``explain``; and what an optimizer shows of itself."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from beside_torch import executions, parameters, set_gradients
from cases import CLASSES, oracle

import compiled_optim
from compiled_optim import LBFGS, Adam, AdamW, CompileFallbackWarning, Optimizer, cache_clear, explain
from compiled_optim.declare import flag, number


class Tagged(torch.nn.Parameter):
    pass


def tagged(count: int) -> list[Any]:
    """Parameters that no kernel takes, of as many shapes."""
    return [Tagged(torch.randn(n + 1, dtype=torch.float64)) for n in range(count)]


def told(steps: int, optimizer: Optimizer, params: list[Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
    return [str(w.message) for w in caught if issubclass(w.category, CompileFallbackWarning)]


# ---- one warning for each reason and device, at the line of the user


@pytest.mark.usefixtures("lenient")
def test_one_warning_for_tensors_of_one_kind() -> None:
    params = [*tagged(20), *parameters()]
    optimizer = AdamW(params, compiled=True)
    (message,) = told(3, optimizer, params)
    assert "20 parameters, the first of shape (1,), are updated eagerly, because its type is Tagged" in message
    assert {row.execution: row.tensors for row in explain(optimizer)} == {"eager": 20, "multi_tensor": 3}


@pytest.mark.usefixtures("lenient")
def test_a_warning_for_each_kind_and_none_for_more_of_one() -> None:
    params = [*tagged(2), *[torch.nn.Parameter(torch.empty(n, device="meta")) for n in (2, 3, 4)]]
    optimizer = AdamW(params, compiled=True)
    assert [m.split(",")[0] for m in told(2, optimizer, params)] == ["2 parameters", "3 parameters"]
    more = tagged(3)
    optimizer.add_param_group({"params": more})
    assert told(2, optimizer, [*params, *more]) == []


def test_a_warning_points_at_the_users_line_and_is_printed_once(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text("""
import torch, compiled_optim
p = torch.nn.Parameter(torch.ones(2, 6)[:, ::2])
p.grad = torch.ones(2, 3)
optimizer = compiled_optim.AdamW([p], compiled=True)
optimizer.step(lambda: 0)  # the user's line
""")
    environment = {**os.environ, "COMPILED_OPTIM_STRICT": "0"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    first, *_ = done.stderr.splitlines()
    assert first.startswith(f"{script}:6: CompileFallbackWarning: ")
    assert done.stderr.count("updated eagerly") == 1


@pytest.mark.usefixtures("lenient")
def test_with_hooks_too_it_points_at_the_users_line() -> None:
    params = tagged(1)
    optimizer = Adam(params, compiled=True)
    optimizer.register_step_post_hook(lambda *_: None)
    params[0].grad = torch.ones_like(params[0])
    with pytest.warns(CompileFallbackWarning) as caught:
        optimizer.step()
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.usefixtures("lenient")
def test_the_log_has_what_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="compiled_optim")
    params = tagged(1)
    messages = told(2, AdamW(params, compiled=True), params)
    assert [r.getMessage() for r in caplog.records if "updated eagerly" in r.getMessage()] == messages
    assert len(messages) == 1


@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}], ids=str)
def test_no_value_is_read_of_a_device_for_graphs_of_lists(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters without any: on a device of graphs, a read would wait, or break the capture."""
    # Inductor has no kernels for parameters without values
    compile_without_kernels = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda f, *, options, **others: compile_without_kernels(f, **others))
    cache_clear()
    params = [torch.nn.Parameter(torch.empty(n, 4, device="meta")) for n in (2, 3)]
    optimizer = AdamW(params, **options, compiled="foreach")
    for value in (0.1, 0.2):
        optimizer.param_groups[0]["lr"] = torch.tensor(value, device="meta")
        assert told(2, optimizer, params) == []
        assert [(row.execution, row.origin) for row in explain(optimizer)] == [("foreach", "memory")]
    assert {t.device.type for p in params for t in optimizer.state[p].values()} == {"meta"}
    cache_clear()


# ---- explain


class Delegating:
    """As Fabric and Lightning wrap: it becomes a subclass of the optimizer's class, and asks that for the rest."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})
        self.__class__ = type(f"Wrapped{type(optimizer).__name__}", (type(self), type(optimizer)), {})
        self._optimizer = optimizer

    @property
    def optimizer(self) -> Any:
        return self._optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


class Asking:
    """As Lightning wraps outside of its strategies."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Holding(torch.optim.Optimizer):
    """As Accelerate wraps: an optimizer that was never constructed as one."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Shard:
    """As ZeroRedundancyOptimizer, Lookahead, SAM and the wrapper of schedulefree hold: under any name."""

    def __init__(self, optimizer: Any) -> None:
        self.param_groups, self.base = optimizer.param_groups, optimizer

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


WRAPPERS = [[Delegating], [Asking], [Holding], [Shard], [Delegating, Holding], [Holding, Delegating], [Shard, Holding]]


@pytest.mark.parametrize("wrappers", WRAPPERS, ids=lambda wrappers: "-".join(w.__name__ for w in wrappers))
def test_explain_looks_into_wrappers(wrappers: list[Any]) -> None:
    params = parameters()
    optimizer = AdamW(params, compiled=True)
    wrapper: Any = optimizer
    for wrap in wrappers:
        wrapper = wrap(wrapper)
    set_gradients(params)
    wrapper.step()
    assert list(explain(wrapper)) == list(explain(optimizer))
    assert executions(wrapper) == {"multi_tensor": ""}


def test_explain_looks_into_wrappers_of_lbfgs() -> None:
    assert [row.reason for row in explain(Holding(LBFGS(parameters())))] == ["compiled=False"]


def test_a_wrapper_that_holds_itself_is_refused() -> None:
    wrapper = Holding(Holding(None))
    wrapper.optimizer.optimizer = wrapper.optimizer.base = wrapper
    for other in (wrapper, Holding(torch.optim.SGD(parameters())), None):
        with pytest.raises(TypeError, match=r"must be a compiled_optim\.Optimizer, or hold one, got"):
            explain(other)


# ---- attributes: what is declared is found in param groups and state only


@pytest.mark.parametrize("cls", [*CLASSES, LBFGS], ids=lambda c: c.__name__)
def test_an_optimizer_has_no_attributes_but_those_of_torchs(cls: Any) -> None:
    ours, stock = cls(parameters()), oracle(cls)(parameters())
    public = {name for name in dir(ours) if not name.startswith("_") and not callable(getattr(ours, name))}
    around = {"grad_norm", "skipped_steps", "max_grad_norm", "ema_decay"} if hasattr(cls, "rule") else set()
    assert public <= {*dir(stock), *around}
    declared = {
        *ours.defaults,
        "fused",
        "capturable",
        "step_count",
        *(cls.rule.declaration.slots if hasattr(cls, "rule") else ()),
    }
    assert [name for name in declared - {"step"} if hasattr(ours, name) or hasattr(cls, name)] == []


def test_what_is_declared_is_inherited_and_can_be_withdrawn() -> None:
    class Mixin:
        momentum: float = number(default=0.5, low=0, below=1)

    class Base(Mixin, Optimizer):
        lr: float = number(default=0.1, low=0)
        foreach = None
        scalars = staticmethod(lambda h, step: {"lr": h.lr})
        update = staticmethod(lambda p, g, s, k, on: p - g * k.lr)

    class Derived(Base):
        lr: float = number(default=0.2, low=0)
        nesterov: bool = flag(default=False, switch=True)

    base, derived = Base(parameters()), Derived(parameters(), lr=0.3, nesterov=True)
    assert "foreach" not in {**base.defaults, **derived.defaults}
    assert (base.defaults["lr"], base.defaults["momentum"], derived.defaults["lr"]) == (0.1, 0.5, 0.3)
    assert derived.rule.declaration.switch_type._fields == ("maximize", "nesterov")
    assert not hasattr(derived, "lr")
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1"):
        Derived(parameters(), momentum=1.0)


# ---- the package


def test_the_names_of_the_package() -> None:
    optimizers = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon"]
    optimizers += ["MuonAdamW", "NAdam", "Optimizer", "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"]
    others = ["CacheInfo", "CacheWarning", "CompileError", "CompileFallbackWarning", "__version__"]
    functions = ["cache_clear", "cache_dir", "cache_info", "explain", "swap_in_optimizer_params_and_state"]
    assert sorted(compiled_optim.__all__) == sorted(optimizers + others + functions)
    on_demand = ["declare", "functional", "lr_scheduler", "plot_schedule", "swa_utils", "testing"]
    assert dir(compiled_optim) == sorted(compiled_optim.__all__ + on_demand)
    assert [name for name in dir(compiled_optim) if not hasattr(compiled_optim, name)] == []


def test_import_is_silent_and_finds_what_is_reached_by_name() -> None:
    code = """
import compiled_optim, sys
assert "sympy" not in sys.modules
for name in dir(compiled_optim): getattr(compiled_optim, name)
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
