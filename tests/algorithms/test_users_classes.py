"""A user's own algorithm, and a user's subclass of one of ours."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch

from compiled_optim import AdamW, Optimizer, cache_info, explain
from compiled_optim._engine.one_pass import ARGUMENTS
from compiled_optim.declare import buffer, flag, number
from compiled_optim.lr_scheduler import ExponentialLR


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*(shape or (3, 4)), dtype=torch.float64))


# ---- a user's own algorithm


class Lion(Optimizer):
    """Chen et al. 2023, arXiv:2302.06675."""

    lr: float = number(default=1e-4, low=0)
    betas: tuple[float, float] = number(default=(0.9, 0.99), low=0, below=1)
    weight_decay: float = number(default=0.0, low=0)
    cautious: bool = flag(default=False, switch=True, kw_only=True)

    exp_avg = buffer()

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"beta1": h.beta1, "beta2": h.beta2, "lr": h.lr, "decay": 1 - h.lr * h.weight_decay}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        direction = (s.exp_avg * k.beta1 + g * (1 - k.beta1)).sign()
        s.exp_avg = s.exp_avg * k.beta2 + g * (1 - k.beta2)
        return p * k.decay - direction * k.lr


def lion_by_hand(
    p: torch.Tensor, grads: list[torch.Tensor], lr: float, b1: float, b2: float, decay: float
) -> torch.Tensor:
    p, m = p.detach().clone(), torch.zeros_like(p)
    for g in grads:
        p = p * (1 - lr * decay) - lr * (b1 * m + (1 - b1) * g).sign()
        m = b2 * m + (1 - b2) * g
    return p


def walk(optimizer: torch.optim.Optimizer, params: list[Any], grads: list[list[torch.Tensor]]) -> None:
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = g.clone()
        optimizer.step()


def gradients(params: list[Any], steps: int) -> list[list[torch.Tensor]]:
    return [[torch.randn_like(p) for p in params] for _ in range(steps)]


def test_a_users_algorithm_has_constructor_and_checks() -> None:
    assert [p.name for p in inspect.signature(Lion).parameters.values()] == [
        *("params", "lr", "betas", "weight_decay"),
        *("maximize", "foreach", "differentiable", "cautious", "compiled", *ARGUMENTS),
    ]
    with pytest.raises(ValueError, match=r"Lion: lr must be at least 0, got -1\.0"):
        Lion([parameter()], lr=-1.0)
    with pytest.raises(ValueError, match=r"Lion: beta2 must be at least 0 and below 1, got 1\.0"):
        Lion([parameter()], betas=(0.9, 1.0))
    assert Lion([parameter()], 0.5).defaults["lr"] == 0.5
    assert "Lion (" in repr(Lion([parameter()]))


@pytest.mark.parametrize("compiled", [False, True, "foreach"])
def test_a_users_algorithm_runs(compiled: bool | str) -> None:
    params = [parameter(3, 4), parameter(5), parameter()]
    grads = gradients(params, 5)
    expected = [lion_by_hand(p, [row[i] for row in grads], 0.02, 0.8, 0.95, 0.3) for i, p in enumerate(params)]
    optimizer = Lion(params, lr=0.02, betas=(0.8, 0.95), weight_decay=0.3, compiled=compiled)
    walk(optimizer, params, grads)
    torch.testing.assert_close([p.detach() for p in params], expected, rtol=0, atol=1e-12)
    executions = {row.execution for row in explain(optimizer)}
    assert executions == {{False: "eager", True: "multi_tensor", "foreach": "foreach"}[compiled]}
    assert set(optimizer.state[params[0]]) == {"exp_avg"}


def test_a_users_algorithm_checkpoints() -> None:
    params = [parameter(3, 4)]
    grads = gradients(params, 6)
    expected = [lion_by_hand(params[0], [row[0] for row in grads], 0.02, 0.9, 0.99, 0.0)]
    first = Lion(params, lr=0.02, compiled=True)
    walk(first, params, grads[:3])
    second = Lion(params, lr=1.0)
    second.load_state_dict(first.state_dict())
    walk(second, params, grads[3:5])
    walk(pickle.loads(pickle.dumps(copy.deepcopy(second))), params, [])
    third = Lion(params, compiled=True)
    third.load_state_dict(second.state_dict())
    walk(third, params, grads[5:])
    torch.testing.assert_close([p.detach() for p in params], expected, rtol=0, atol=1e-12)


# ---- a user's subclass of one of ours, which declares nothing new


class Plain(AdamW):
    pass


class Stepping(AdamW):
    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)


class Constructed(AdamW):
    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        super().__init__(model.parameters(), **options)
        self.model_name = type(model).__name__


class Decayed(Stepping):
    """A changed default only."""

    def __init__(self, params: Any, lr: float = 0.5, **options: Any) -> None:
        super().__init__(params, lr, **options)


MAKE = {
    "plain": lambda model, **o: Plain(model.parameters(), lr=0.1, **o),
    "step": lambda model, **o: Stepping(model.parameters(), lr=0.1, **o),
    "init": lambda model, **o: Constructed(model, lr=0.1, **o),
    "both": lambda model, **o: Decayed(model.parameters(), lr=0.1, **o),
}


@pytest.mark.parametrize("stock_first", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", MAKE)
def test_subclasses_share_kernels_and_fire_hooks_once(kind: str, compiled: bool, stock_first: bool) -> None:
    if stock_first:
        torch.optim.AdamW([parameter()])
    models = [torch.nn.Linear(3, 2, dtype=torch.float64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    params = [list(m.parameters()) for m in models]
    grads = gradients(params[0], 3)
    walk(AdamW(params[0], lr=0.1, compiled=compiled), params[0], grads)
    before = cache_info()
    optimizer = MAKE[kind](models[1], compiled=compiled)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    walk(optimizer, params[1], grads)
    assert calls == ["pre", "post"] * 3
    assert cache_info()._replace(hits=0) == before._replace(hits=0)
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()), rtol=0, atol=0)
    if isinstance(optimizer, Stepping):
        assert optimizer.steps == 3
    assert {row.execution for row in explain(optimizer)} == {"multi_tensor" if compiled else "eager"}


def test_a_subclass_overriding_step_passes_the_closure() -> None:
    p = parameter()
    p.grad = torch.ones_like(p)
    assert Stepping([p], compiled=True).step(lambda: 7.0) == 7.0


def test_an_optimizer_may_be_reclassed() -> None:
    """As Lightning does, without calling ``__init__``."""
    params = [parameter()]
    expected = [params[0].detach().clone().requires_grad_()]
    grads = gradients(params, 2)
    walk(torch.optim.AdamW(expected), expected, grads)
    optimizer = AdamW(params, compiled=True)
    walk(optimizer, params, grads[:1])
    before = cache_info().misses
    optimizer.__class__ = type("Wrapped", (AdamW,), {})  # type: ignore[assignment]
    walk(optimizer, params, grads[1:])
    assert cache_info().misses == before
    torch.testing.assert_close(params[0].detach(), expected[0].detach(), rtol=0, atol=1e-12)


# ---- a user's class in the style of torch, with a step of its own


def heavy_ball(base: Any) -> Any:
    class HeavyBall(base):  # type: ignore[misc]
        def __init__(self, params: Any, lr: float = 0.1, masks: Any = ()) -> None:
            super().__init__(params, {"lr": lr, "masks": list(masks)})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = None if closure is None else torch.enable_grad()(closure)()
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        state = self.state[p]
                        state["speed"] = state.get("speed", 0) * 0.5 + p.grad
                        p.sub_(state["speed"], alpha=group["lr"])
            return loss

    return HeavyBall


HeavyBall, StockHeavyBall = heavy_ball(Optimizer), heavy_ball(torch.optim.Optimizer)


def test_a_class_in_the_style_of_torch_does_what_it_does_there() -> None:
    ours, stock = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    pair: list[tuple[Any, Any]] = [(HeavyBall([ours], masks=[1]), ours), (StockHeavyBall([stock], masks=[1]), stock)]
    schedules = [ExponentialLR(optimizer, 0.5) for optimizer, _ in pair]
    calls: list[Any] = []
    for optimizer, _ in pair:
        optimizer.register_step_post_hook(lambda *args: calls.append(1))
    for _ in range(3):
        for (optimizer, p), schedule in zip(pair, schedules, strict=True):
            optimizer.zero_grad()

            def closure(p: Any = p) -> Any:
                loss = p.square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
            schedule.step()
    assert torch.equal(ours, stock)
    assert len(calls) == 6
    mine = pair[0][0]
    saved = mine.state_dict()
    assert saved["param_groups"] == pair[1][0].state_dict()["param_groups"]
    assert saved["param_groups"][0]["masks"] == [1]
    for other in (copy.deepcopy(mine), HeavyBall([torch.nn.Parameter(ours.detach())])):
        other.load_state_dict(copy.deepcopy(saved))
        (p,) = other.param_groups[0]["params"]
        assert torch.equal(other.state[p]["speed"], mine.state[ours]["speed"])
    assert [row.execution for row in explain(mine)] == ["eager"]


def test_a_class_in_the_style_of_torch_keeps_its_own_state_as_it_is() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = HeavyBall([p])
    optimizer.state[p]["rows"] = torch.ones(3).to_sparse()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[p]["rows"].is_sparse


def test_what_needs_a_rule_says_so() -> None:
    optimizer = HeavyBall([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match="HeavyBall declares no rule, and its own step moves no schedule"):
        optimizer.attach(ExponentialLR(optimizer, 0.5))
    with pytest.raises(TypeError, match="step_in_backward needs an optimizer that declares a rule, got a HeavyBall"):
        optimizer.step_in_backward()
    with pytest.raises(TypeError, match="Optimizer: state_dict must be a dict as state_dict"):
        optimizer.load_state_dict([])  # type: ignore[arg-type]
