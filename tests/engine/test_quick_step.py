"""Steps in one call of the host module: what they look at, what they leave to the long way, and that none is wrong."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from beside_torch import Lockstep, executions, tensors
from cases import ELEMENTWISE, oracle, tolerance
from test_staleness import adam, sgd
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from compiled_optim import SGD, Adam, Optimizer, explain, lr_scheduler
from compiled_optim._engine.executions.dispatch import Execution
from compiled_optim.declare import number

SHAPES: list[tuple[int, ...]] = [(5, 7), (3, 4, 2, 2), (), (131,)]
both_rules = pytest.mark.parametrize("rule", [adam, sgd])


@pytest.fixture
def long_steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with each step that is not quick."""
    taken: list[Any] = []
    step = Execution.step

    def counted(execution: Execution, work: Any) -> None:
        taken.append(work)
        step(execution, work)

    monkeypatch.setattr(Execution, "step", counted)
    return taken


def steps(run: Lockstep, long_steps: list[Any], *, quick: bool, count: int = 2, rtol: float = 1e-12) -> None:
    """Steps that are all quick, or of which the first is not."""
    begun = len(long_steps)
    run.step(count)
    run.compare(rtol)
    assert (len(long_steps) == begun) == quick, f"{len(long_steps) - begun} long steps of {count}"


# ---- what needs no long step


@pytest.mark.parametrize(
    "around", [{"master_weights": True}, {"stochastic_rounding": 3}, {"state_dtype": torch.float32}], ids=str
)
def test_steps_with_options_of_storage_are_quick(around: dict[str, Any], long_steps: list[Any]) -> None:
    """As they are taken long, which an eager step is; a GradScaler takes long ones, and then they are quick again."""
    params, others = ([torch.nn.Parameter(torch.full((7,), 1.5, dtype=torch.bfloat16))] for _ in range(2))
    quick, long = Adam(params, compiled=True, **around), Adam(others, **around)
    for scale in (None, None, 8.0, None, None):
        params[0].grad = torch.randn(7).bfloat16()
        others[0].grad = params[0].grad.clone()
        begun = len(long_steps)
        if scale is not None:
            params[0].grad *= scale
            quick.grad_scale = torch.tensor(scale)
        quick.step()
        if scale is not None:
            del quick.grad_scale
        assert (len(long_steps) == begun) == (begun > 0 and scale is None)
        long.step()
        del long_steps[max(1, begun) :]
        torch.testing.assert_close(params[0], others[0], rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("cls", [cls for cls in ELEMENTWISE if cls.accepts_dense], ids=lambda cls: cls.__name__)
def test_steps_are_quick_from_the_second_on(cls: Any, long_steps: list[Any]) -> None:
    run = Lockstep(oracle(cls), lambda params: cls(params, compiled=True), tensors(SHAPES))
    run.step(4)
    assert len(long_steps) == 1
    run.compare(tolerance(cls))


def in_groups(options: list[dict[str, Any]], ours: Any = Adam) -> Lockstep:
    def build(cls: Any, params: list[Any], **how: Any) -> Any:
        groups = [{"params": params[i :: len(options)], **group} for i, group in enumerate(options)]
        return cls(groups, **how)

    return Lockstep(
        lambda params: build(oracle(ours), params),
        lambda params: build(ours, params, compiled=True),
        tensors(SHAPES),
    )


@pytest.mark.parametrize("cls", [c for c in ELEMENTWISE if c.rule.declaration.carried], ids=lambda cls: cls.__name__)
def test_groups_carry_scalars_of_their_own(cls: Any, long_steps: list[Any]) -> None:
    torch.set_default_dtype(torch.float64)
    run = in_groups([{}, {"lr": 0.03}], cls)
    run.step()
    steps(run, long_steps, quick=True, count=3)


def test_groups_and_step_counts_of_their_own(long_steps: list[Any]) -> None:
    run = in_groups([{"lr": 0.1}, {"lr": 0.2, "betas": (0.5, 0.7)}])
    run.step(missing=[0])
    run.step(missing=[1])
    run.step()
    steps(run, long_steps, quick=True, count=3)
    assert len({run.ours.state[p]["step"].item() for p in run.params[1]}) > 1


@both_rules
def test_values_change(rule: Any, long_steps: list[Any]) -> None:
    run = rule()
    run.step(2)
    values: list[dict[str, Any]] = [{"lr": 0.1}, {"lr": 1}, {"lr": 0.3}]
    values += [{"betas": (0.5, 0.75)}, {"betas": (0.5, 0)}, {"eps": 1e-3}] if rule is adam else [{"momentum": 0.3}]
    for options in values:
        run.both(lambda optimizer, _, options=options: optimizer.param_groups[0].update(options))
        steps(run, long_steps, quick=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_learning_rate_that_is_a_tensor(dtype: torch.dtype, long_steps: list[Any]) -> None:
    rtol = 1e-12 if dtype == torch.float64 else 1e-6  # torch multiplies by it in its dtype
    run = adam()
    run.step()
    run.both(lambda optimizer, _: optimizer.param_groups[0].update(lr=torch.tensor(0.125, dtype=dtype)))
    steps(run, long_steps, quick=True, rtol=rtol)
    run.both(lambda optimizer, _: optimizer.param_groups[0]["lr"].mul_(2))
    steps(run, long_steps, quick=True, rtol=rtol)


@both_rules
def test_tensors_change_in_place_and_are_replaced(rule: Any, long_steps: list[Any]) -> None:
    run = rule()
    run.step(2)
    name = "exp_avg" if rule is adam else "momentum_buffer"
    fresh = torch.randn(5, 7, dtype=torch.float64)
    for change in (
        lambda _, params: params[0].data.mul_(0.5),
        lambda _, params: setattr(params[0], "data", fresh.clone()),
        lambda optimizer, params: optimizer.state[params[0]].update({name: fresh.clone()}),
        lambda optimizer, params: optimizer.state[params[0]][name].zero_(),
    ):
        run.both(change)
        steps(run, long_steps, quick=True)


def test_an_attached_schedule_moves(long_steps: list[Any]) -> None:
    run = adam()
    schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizers[0], 0.5)
    attached = lr_scheduler.ExponentialLR(run.ours, 0.5)
    run.ours.attach(attached)
    for _ in range(4):
        run.step()
        schedule.step()
        run.compare()
    assert run.ours.param_groups[0]["lr"] == run.optimizers[0].param_groups[0]["lr"]
    assert len(long_steps) == 1
    run.ours.detach(attached)
    steps(run, long_steps, quick=True)


def test_an_attached_schedule_has_ended(long_steps: list[Any]) -> None:
    run = sgd()
    run.ours.attach(lr_scheduler.OneCycleLR(run.ours, max_lr=0.1, total_steps=3))
    for _ in range(3):
        run.ours.step()
    before = [p.tolist() for p in run.params[1]]
    with pytest.raises(ValueError, match="3"):
        run.ours.step()
    assert [p.tolist() for p in run.params[1]] == before
    assert len(long_steps) <= 1


def test_schedulers_see_that_the_optimizer_steps(long_steps: list[Any]) -> None:
    """Or torch warns, which is an error here."""
    run = sgd()
    run.step(2)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in run.optimizers]
    for _ in range(2):
        run.step()
        for schedule in schedules:
            schedule.step()
    run.compare()
    assert len(long_steps) == 1


# ---- steps that clip, skip and average


def clipped(**options: Any) -> Lockstep:
    """Beside our own eager steps, which follow torch's separate passes in other tests."""
    return Lockstep(
        lambda params: Adam(params, lr=0.1, **options),
        lambda params: Adam(params, lr=0.1, **options, compiled=True),
        tensors(SHAPES),
    )


def test_steps_that_clip_skip_and_average(long_steps: list[Any]) -> None:
    run = clipped(max_grad_norm=0.5, skip_nonfinite=True, ema_decay=lambda step: 1 - 1 / (1 + step))
    run.step()

    def taken(count: int) -> None:
        """Steps of which those of the reference alone are long."""
        long_steps.clear()
        run.step(count)
        run.compare()
        assert len(long_steps) == count

    taken(2)
    run.both(lambda optimizer, _: setattr(optimizer, "max_grad_norm", 0.125))
    taken(1)
    for params in run.params:
        params[0].grad.fill_(torch.inf)
    long_steps.clear()
    run.step_as_is()
    run.compare()
    assert not long_steps
    assert run.ours.skipped_steps == 1
    seen: list[Any] = []
    handle = run.ours.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer))
    taken(2)
    assert seen == [run.ours] * 2
    handle.remove()
    for optimizer in run.optimizers:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    taken(1)
    with run.ours.averaged(), pytest.raises(RuntimeError, match="averaged"):
        run.ours.step()
    taken(1)


def test_a_step_that_clips_finds_compilation_switched_off(
    long_steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = clipped(max_grad_norm=0.5, skip_nonfinite=True, ema_decay=lambda step: 1 - 1 / (1 + step))
    run.step(2)
    monkeypatch.setenv("COMPILED_OPTIM_DISABLE", "1")
    steps(run, long_steps, quick=False)
    assert "COMPILED_OPTIM_DISABLE" in executions(run.ours)["eager"]
    monkeypatch.delenv("COMPILED_OPTIM_DISABLE")
    run.step()
    assert executions(run.ours) == {"multi_tensor": ""}


# ---- what is told of a step


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("of_all", [False, True], ids=["own", "of all optimizers"])
def test_hooks_are_called(when: str, of_all: bool, long_steps: list[Any]) -> None:
    run = sgd()
    run.step(2)
    seen: list[Any] = []
    of_any = {"pre": register_optimizer_step_pre_hook, "post": register_optimizer_step_post_hook}[when]
    register: Any = of_any if of_all else getattr(run.ours, f"register_step_{when}_hook")
    handle = register(lambda optimizer, *_: seen.append(optimizer))
    try:
        steps(run, long_steps, quick=False)
    finally:
        handle.remove()
    assert seen.count(run.ours) == 2
    steps(run, long_steps, quick=True)
    assert seen.count(run.ours) == 2


def test_hooks_of_a_subclass_that_has_a_step_of_its_own(long_steps: list[Any]) -> None:
    class Louder(SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append("step")
            return super().step(closure)

    seen: list[str] = []
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    optimizer = Louder([p], lr=0.5, compiled=True)
    for _ in range(3):
        optimizer.step()
    assert len(long_steps) == 1
    optimizer.register_step_pre_hook(lambda *_: seen.append("hook"))
    optimizer.step()
    assert seen == [*["step"] * 3, "hook", "step"]
    assert p.tolist() == [-1.0] * 3


def test_a_profiler_sees_the_step(long_steps: list[Any]) -> None:
    run = sgd()
    run.step(2)
    with torch.profiler.profile() as profile:
        run.ours.step()
    assert [e for e in profile.events() if e.name == "Optimizer.step#SGD.step"]
    assert len(long_steps) == 2
    run.optimizers[0].step()
    steps(run, long_steps, quick=True)


def test_a_closure_is_called(long_steps: list[Any]) -> None:
    run = sgd()
    run.step(2)
    for optimizer in run.optimizers:
        assert optimizer.step(lambda: 3.0) == 3.0
    run.compare()
    steps(run, long_steps, quick=True)


def test_a_grad_scaler_comes_and_goes(long_steps: list[Any]) -> None:
    run = Lockstep(
        lambda params: torch.optim.Adam(params, fused=True),
        lambda params: Adam(params, fused=True),
        tensors(SHAPES),
    )
    run.step(2)
    begun = len(long_steps)
    for found in (0.0, 1.0):
        for optimizer in run.optimizers:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found)
        run.step()
        run.compare()
    assert len(long_steps) == begun + 1  # the other was skipped
    for optimizer in run.optimizers:
        del optimizer.grad_scale, optimizer.found_inf
    steps(run, long_steps, quick=True)


# ---- switches of compilation


@contextmanager
def variable(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv(name, "1")
        yield


@contextmanager
def stance(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with torch.compiler.set_stance(name):
        yield


OFF = [(variable, "TORCH_COMPILE_DISABLE"), (variable, "COMPILED_OPTIM_DISABLE")]
OFF += [(stance, "force_eager"), (stance, "eager_on_recompile")]


@both_rules
@pytest.mark.parametrize(("how", "name"), OFF, ids=lambda x: x if isinstance(x, str) else "")
def test_compilation_is_switched_off(
    how: Any, name: str, rule: Any, long_steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = rule()
    run.step(2)
    with how(name, monkeypatch):
        steps(run, long_steps, quick=False)
        assert name in executions(run.ours)["eager"]
    run.step()
    assert executions(run.ours) == {"multi_tensor": ""}  # the reason of before is no longer told
    steps(run, long_steps, quick=True)


def test_another_environment(long_steps: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = sgd()
    run.step(2)
    monkeypatch.setattr("os.environ", {"COMPILED_OPTIM_DISABLE": "1"})
    steps(run, long_steps, quick=False)
    assert "COMPILED_OPTIM_DISABLE" in executions(run.ours)["eager"]


def test_a_variable_that_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = sgd()
    run.step(2)
    monkeypatch.setenv("COMPILED_OPTIM_DISABLE", "perhaps")
    with pytest.raises(ValueError, match="perhaps"):
        run.ours.step()


# ---- param groups


@both_rules
@pytest.mark.parametrize("option", ["maximize", "weight_decay"])
def test_a_switch_changes(option: str, rule: Any, long_steps: list[Any]) -> None:
    run = rule()
    run.step(2)
    run.both(lambda optimizer, _: optimizer.param_groups[0].update({option: 0.5 if option == "weight_decay" else True}))
    steps(run, long_steps, quick=False)
    steps(run, long_steps, quick=True)


def test_a_switch_of_a_group_in_which_nothing_is_updated(long_steps: list[Any]) -> None:
    run = in_groups([{}, {}])
    run.step(2)
    run.step(2, missing=[1, 3])
    run.both(lambda optimizer, _: optimizer.param_groups[1].update(weight_decay=0.5))
    begun = len(long_steps)
    run.step(missing=[1, 3])
    assert len(long_steps) == begun + 1
    run.step(2)
    run.compare()


@both_rules
def test_param_groups_change(rule: Any, long_steps: list[Any]) -> None:
    run = rule()
    more = torch.randn(3, 2, dtype=torch.float64)
    for params in run.params:
        params.append(torch.nn.Parameter(more.clone()))
    run.step(2)  # without the new one
    run.both(lambda optimizer, params: optimizer.add_param_group({"params": params[-1:], "lr": 0.5}))
    steps(run, long_steps, quick=False)
    steps(run, long_steps, quick=True)
    run.both(lambda optimizer, params: optimizer.param_groups[0]["params"].pop(0))
    steps(run, long_steps, quick=False)
    run.both(lambda optimizer, params: optimizer.param_groups.reverse())
    steps(run, long_steps, quick=False)
    run.both(lambda optimizer, params: optimizer.param_groups[0].update(params=tuple(params[-1:])))
    steps(run, long_steps, quick=False)


@pytest.mark.parametrize("value", [[0.5, 0.6], (0.5, 10**400), (0.5,), None, "text", torch.ones(2) / 2], ids=str)
def test_options_that_are_not_plain(value: Any, long_steps: list[Any]) -> None:
    """They are read as in a first step, or raise what they raise there."""
    outcomes = []
    for before in (2, 0):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = Adam([p], compiled=True)
        p.grad = torch.ones_like(p)
        for _ in range(before):
            optimizer.step()
        optimizer.param_groups[0]["betas"] = value
        long_steps.clear()
        try:
            optimizer.step()
        except (TypeError, ValueError, OverflowError) as error:
            outcomes.append(str(error))
        else:
            outcomes.append("stepped")
        assert len(long_steps) == 1
    assert outcomes[0] == outcomes[1]


def test_an_option_is_missing() -> None:
    run = adam()
    run.step(2)
    del run.ours.param_groups[0]["eps"]
    with pytest.raises(KeyError, match="eps"):
        run.ours.step()


# ---- state and gradients


def other_layout(g: Any) -> Any:
    return torch.empty(g.shape[::-1], dtype=g.dtype).permute(*range(g.dim())[::-1]).copy_(g)


CHANGES: dict[str, Callable[[Any, list[Any]], Any]] = {
    "state loaded": lambda optimizer, _: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "state cleared": lambda optimizer, _: optimizer.state.clear(),
    "state added": lambda optimizer, params: optimizer.state[params[0]].update(mine=1.0),
    "another count": lambda optimizer, params: optimizer.state[params[0]].update(momentum_buffer=torch.zeros(5, 7)),
    "a gradient is missing": lambda _, params: setattr(params[1], "grad", None),
    "another layout": lambda _, params: setattr(params[0], "grad", other_layout(params[0].grad)),
    "another dtype": lambda _, params: [setattr(p, "data", p.data.float()) for p in params],
}


@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("ignore::compiled_optim.CompileFallbackWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_tensors_that_are_others(change: Any) -> None:
    """Beside our own eager steps, which follow torch's in other tests."""
    run = Lockstep(
        lambda params: SGD(params, lr=0.1, momentum=0.9),
        lambda params: SGD(params, lr=0.1, momentum=0.9, compiled=True),
        tensors(SHAPES),
    )
    run.step(3)
    run.both(change)
    run.step_as_is()
    run.compare_parameters(1e-6)


@both_rules
def test_copies_have_steps_of_their_own(rule: Any, long_steps: list[Any]) -> None:
    run = rule()
    run.step(3)
    for duplicate in (copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))):
        other = duplicate(run.ours)
        copied, reference = other.param_groups[0]["params"], duplicate(run.optimizers[0])
        for p in copied:
            p.grad = torch.ones_like(p)
        for p in reference.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        before = [p.tolist() for p in run.params[1]]
        for _ in range(2):
            other.step()
            reference.step()
        torch.testing.assert_close(copied, reference.param_groups[0]["params"])
        assert [p.tolist() for p in run.params[1]] == before
    assert len(long_steps) == 3
    steps(run, long_steps, quick=True)


# ---- Python that runs while a step is under way


class Mine(Optimizer):
    """Its `scalars` does what a test has it do."""

    lr: float = number(default=0.5)
    action: Any = staticmethod(lambda: None)

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        Mine.action()
        return {"lr": h.lr, **more}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - g * k.lr


more: dict[str, Any] = {}


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An optimizer and its parameters, after two steps from zero along gradients of one."""
    params = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 2)]
    optimizer = Mine([{"params": [p]} for p in params], compiled=True)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
    yield optimizer, params
    more.clear()
    Mine.action = staticmethod(lambda: None)


def test_scalars_replace_gradients(mine: Any, long_steps: list[Any]) -> None:
    """The step is of what they leave."""
    optimizer, (p, q) = mine

    def replace() -> None:
        p.grad = torch.full_like(p, 4.0)
        q.grad = None
        gc.collect()

    Mine.action = staticmethod(replace)
    optimizer.step()
    assert p.tolist() == [-3.0] * 3
    assert q.tolist() == [-1.0] * 2


def test_scalars_replace_param_groups(mine: Any, long_steps: list[Any]) -> None:
    optimizer, (p, q) = mine

    def replace() -> None:
        optimizer.param_groups[1]["params"] = []
        gc.collect()

    Mine.action = staticmethod(replace)
    optimizer.step()
    assert p.tolist() == [-1.5] * 3
    assert q.tolist() == [-1.0] * 2
    assert long_steps


def test_scalars_clear_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another first step follows."""
    run = adam()
    run.step(3)
    scalars, cleared = Adam.scalars, []

    def clear(h: Any, step: Any) -> Any:
        if not cleared:
            cleared.append(run.ours.state.clear())
            gc.collect()
        return scalars(h, step)

    monkeypatch.setattr(Adam, "scalars", staticmethod(clear))
    run.ours.step()
    assert {run.ours.state[p]["step"].item() for p in run.params[1]} == {1.0}


def test_scalars_step_again(mine: Any) -> None:
    optimizer, (p, q) = mine
    inner: list[int] = []

    def again() -> None:
        if not inner:
            inner.append(1)
            optimizer.step()

    Mine.action = staticmethod(again)
    optimizer.step()
    assert p.tolist() == [-2.0] * 3
    assert q.tolist() == [-2.0] * 2


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_scalars_raise(error: type[BaseException], mine: Any, long_steps: list[Any]) -> None:
    optimizer, (p, q) = mine

    def fail() -> None:
        raise error("here")

    Mine.action = staticmethod(fail)
    with pytest.raises(error, match="here"):
        optimizer.step()
    assert p.tolist() == [-1.0] * 3
    assert bool(long_steps) == (error is ZeroDivisionError)
    Mine.action = staticmethod(lambda: None)
    optimizer.step()
    assert p.tolist() == [-1.5] * 3
    assert q.tolist() == [-1.5] * 2


def test_scalars_return_others(mine: Any) -> None:
    optimizer, (p, _) = mine
    more["beside"] = 1.0
    with pytest.raises(ValueError, match=r"\['lr'\], got \['lr', 'beside'\]"):
        optimizer.step()
    assert p.tolist() == [-1.0] * 3


@pytest.mark.parametrize("value", [torch.tensor(0.25), 10**400, "text", None], ids=str)
def test_scalars_return_no_floats(value: Any, mine: Any) -> None:
    optimizer, (p, _) = mine
    more["lr"] = value
    if isinstance(value, torch.Tensor):
        optimizer.step()
        assert p.tolist() == [-1.25] * 3
    else:
        with pytest.raises((TypeError, ValueError, OverflowError)):
            optimizer.step()
        assert p.tolist() == [-1.0] * 3


FACTOR = 1.0


class Referring(Optimizer):
    lr: float = number(default=0.5)

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - g * (k.lr * FACTOR)


def other_update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p + g * k.lr


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("change", ["what it refers to", "itself"])
def test_the_update_changes(change: str, long_steps: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    optimizer = Referring([p], compiled=True)
    for _ in range(3):
        optimizer.step()
    assert len(long_steps) == 1
    if change == "itself":
        monkeypatch.setattr(Referring, "update", staticmethod(other_update))
    else:
        monkeypatch.setitem(globals(), "FACTOR", 3.0)
    with pytest.warns(match="has changed since it was compiled"):
        optimizer.step()
    assert p.tolist() == [-1.0 if change == "itself" else -3.0] * 3
    assert "has changed" in executions(optimizer)["eager"]


def test_other_scalars_are_taken_at_once(long_steps: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    optimizer = Referring([p], compiled=True)
    for _ in range(2):
        optimizer.step()
    monkeypatch.setattr(Referring, "scalars", staticmethod(lambda h, step: {"lr": 10 * h.lr}))
    optimizer.step()
    assert p.tolist() == [-6.0] * 3
    assert len(long_steps) == 1


def test_nothing_keeps_an_optimizer_that_is_gone() -> None:
    """Also where its rule refers to it, which only the garbage collector can see."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    optimizers: list[Any] = []

    class Refers(Mine):
        @staticmethod
        def scalars(h: Any, step: Any) -> dict[str, Any]:
            return {"lr": len(optimizers) / 2}

    optimizers.append(Refers([p], compiled=True))
    for _ in range(3):
        optimizers[0].step()
    assert p.tolist() == [-1.5] * 3
    assert [row.execution for row in explain(optimizers[0])] == ["multi_tensor"]
    gone = weakref.ref(optimizers[0])
    optimizers.clear()
    del Refers
    gc.collect()
    assert gone() is None


def test_parameters_go_with_their_optimizer() -> None:
    """At once, without the garbage collector."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    optimizer = Referring([p], compiled=True)
    for _ in range(3):
        optimizer.step()
    gone = weakref.ref(p)
    gc.collect()
    gc.disable()
    try:
        del p, optimizer
        assert gone() is None
    finally:
        gc.enable()
