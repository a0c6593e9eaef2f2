"""What a class declares is what torch.optim offers: constructor, checks, defaults; and a user can declare one too."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import ALL, CLASSES, IDS, named, oracle, unique_option_sets

from compiled_optim import AdamW, Optimizer, cache_info, explain
from compiled_optim.algorithms import SGD, Adam
from compiled_optim.declare import Number, buffer, flag, number

NUMBERS = [
    (cls, name, field)
    for cls in CLASSES
    for name, field in cls.declaration.options.items()
    if isinstance(field, Number)
]
TUPLES = [(cls, name, field) for cls, name, field in NUMBERS if isinstance(field.default, tuple)]
BOUNDED = [(cls, name, field) for cls, name, field in NUMBERS if field.low is not None]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)


def ids(cases: list[tuple[type[Optimizer], str, Number]]) -> list[str]:
    return [f"{cls.__name__}-{name}" for cls, name, _ in cases]


def parameter(*shape: int, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*(shape or (3, 4)), dtype=dtype))


def test_one_class_for_each_declaration() -> None:
    assert CLASSES
    assert {cls.__name__ for cls in CLASSES} <= set(dir(torch.optim))


@every_class
def test_signature_is_that_of_torch_plus_compiled(cls: type[Optimizer]) -> None:
    def plain(function: Any) -> list[inspect.Parameter]:
        parameters = inspect.signature(function).parameters.values()
        return [p.replace(annotation=inspect.Parameter.empty) for p in parameters]

    ours, stock = plain(cls.__init__), plain(oracle(cls).__init__)
    assert ours[-1] == inspect.Parameter("compiled", inspect.Parameter.KEYWORD_ONLY, default=False)
    # signatures compare positional arguments in their order, and keyword-only ones as a set
    assert inspect.Signature(ours[:-1]) == inspect.Signature(stock)
    assert list(inspect.signature(cls).parameters)[-1] == "compiled"


@pytest.mark.parametrize(("cls", "options"), ALL, ids=IDS)
def test_defaults_groups_and_repr_are_those_of_torch(cls: type[Optimizer], options: dict[str, Any]) -> None:
    p = parameter()
    ours, stock = cls([p], **options), oracle(cls)([p], **options)
    assert ours.defaults == stock.defaults
    assert {k: type(v) for k, v in ours.defaults.items()} == {k: type(v) for k, v in stock.defaults.items()}
    assert ours.param_groups == stock.param_groups
    assert repr(ours) == repr(stock)
    assert isinstance(ours, torch.optim.Optimizer)
    assert type(ours).__name__ == type(stock).__name__
    assert not ours.state


@every_class
def test_arguments_are_bound_as_python_binds_them(cls: type[Optimizer]) -> None:
    p = parameter()
    with pytest.raises(TypeError, match="params"):
        cls()
    with pytest.raises(TypeError, match="no_such_option"):
        cls([p], no_such_option=1)
    with pytest.raises(TypeError, match="multiple values"):
        cls([p], 0.1, lr=0.1)
    positional = [n for n, v in inspect.signature(cls).parameters.items() if v.kind is v.POSITIONAL_OR_KEYWORD][1:]
    values = [cls.declaration.options[n].default for n in positional]
    assert cls([p], *values).defaults == cls([p]).defaults
    with pytest.raises(TypeError, match="positional"):
        cls([p], *values, True)


def refused(error: type[Exception], cls: type[Optimizer], option: str, value: Any, *words: str) -> None:
    with pytest.raises(error) as caught:
        cls([parameter()], **{option: value})
    message = str(caught.value)
    assert message.startswith(f"{cls.__name__}: ")
    assert re.search(rf"\b{option.removesuffix('s')}", message), message
    for word in words:
        assert word in message


def spread(field: Number, bad: Any) -> list[Any]:
    """The values of an option that are ``bad`` in one place."""
    if not isinstance(field.default, tuple):
        return [bad]
    return [tuple(bad if i == j else d for j, d in enumerate(field.default)) for i in range(len(field.default))]


@pytest.mark.parametrize(("cls", "name", "field"), BOUNDED, ids=ids(BOUNDED))
def test_values_out_of_range_are_refused(cls: type[Optimizer], name: str, field: Number) -> None:
    bad = [field.low - 0.5, float("nan"), -float("inf"), np.float64(field.low - 0.5)]
    bad += [] if field.below is None else [field.below, float(field.below) + 1]
    for value in bad:
        for whole in spread(field, value):
            refused(ValueError, cls, name, whole, repr(value), field.range)
    if field.below is None:
        assert f"{field.low:g}" in field.range
    else:
        assert f"[{field.low:g}, {field.below:g})" in field.range


@pytest.mark.parametrize(("cls", "name", "field"), NUMBERS, ids=ids(NUMBERS))
def test_what_is_no_number_is_refused(cls: type[Optimizer], name: str, field: Number) -> None:
    for value in ("0.1", None, 1j, [0.1]):
        for whole in spread(field, value):
            refused(TypeError, cls, name, whole, repr(value), field.range)


@pytest.mark.parametrize(("cls", "name", "field"), NUMBERS, ids=ids(NUMBERS))
def test_tensors_of_another_size_are_refused(cls: type[Optimizer], name: str, field: Number) -> None:
    pair = torch.tensor([0.1, 0.2])
    if isinstance(field.default, tuple):
        whole = tuple(pair for _ in field.default)
        refused(ValueError, cls, name, whole, "(2,)")
    else:
        refused(ValueError, cls, name, pair, "(2,)")
        refused(ValueError, cls, name, torch.tensor([]), "(0,)")


@pytest.mark.parametrize(("cls", "name", "field"), TUPLES, ids=ids(TUPLES))
def test_tuples_have_one_length_and_one_kind(cls: type[Optimizer], name: str, field: Number) -> None:
    n = len(field.default)
    for value in (field.default[:-1], (*field.default, 0.5), ()):
        refused(ValueError, cls, name, value, repr(value), f"{n} values")
    mixed = (torch.tensor(field.default[0]), *field.default[1:])
    refused(ValueError, cls, name, mixed, "all floats or all tensors")
    for value in (0.9, None, torch.tensor(0.9)):
        refused(TypeError, cls, name, value, f"{n} values")


@pytest.mark.parametrize(("cls", "name", "field"), BOUNDED, ids=ids(BOUNDED))
def test_tensors_have_the_same_range(cls: type[Optimizer], name: str, field: Number) -> None:
    for bad in (field.low - 0.5, float("nan")):
        tensors: Any = torch.tensor(bad)
        if isinstance(field.default, tuple):
            tensors = tuple(torch.tensor(bad) for _ in field.default)
        refused(ValueError, cls, name, tensors, field.range)


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0}, {"momentum": 0.9, "dampening": 0.1}, {"momentum": 0.0, "dampening": 0.5}],
    ids=named,
)
def test_nesterov_needs_momentum_and_no_dampening(options: dict[str, Any]) -> None:
    refused(ValueError, SGD, "nesterov", True, "momentum above 0", "dampening 0")
    with pytest.raises(ValueError, match=r"SGD: nesterov=True needs momentum") as caught:
        SGD([parameter()], nesterov=True, **options)
    assert f"momentum={options['momentum']!r}" in str(caught.value)


@every_class
@pytest.mark.parametrize("value", ["x", "True", "", None, 2])
def test_compiled_has_four_values(cls: type[Optimizer], value: Any) -> None:
    with pytest.raises(ValueError, match="compiled must be False, True, 'multi_tensor' or 'foreach'") as caught:
        cls([parameter()], compiled=value)
    assert repr(value) in str(caught.value)


@every_class
@pytest.mark.parametrize(
    "options",
    [
        {"fused": True, "foreach": True},
        {"compiled": True, "differentiable": True},
        {"compiled": "foreach", "differentiable": True},
        {"fused": True, "differentiable": True},
    ],
    ids=named,
)
def test_options_that_exclude_each_other(cls: type[Optimizer], options: dict[str, Any]) -> None:
    if not set(options) - {"compiled"} <= set(cls.declaration.signature().parameters):
        pytest.skip(f"torch.optim.{cls.__name__} does not have these options")
    with pytest.raises(RuntimeError) as caught:
        cls([parameter()], **options)
    for name, value in options.items():
        assert f"{name}={value!r}" in str(caught.value)


@pytest.mark.parametrize(("cls", "name", "field"), NUMBERS, ids=ids(NUMBERS))
@pytest.mark.parametrize("scalar", [np.float64, np.float32, np.int64], ids=lambda t: t.__name__)
def test_numpy_scalars_become_plain_python(cls: type[Optimizer], name: str, field: Number, scalar: Any) -> None:
    value = scalar(0.5)
    whole = tuple(value for _ in field.default) if isinstance(field.default, tuple) else value
    p, q = parameter(), parameter()
    optimizer = cls([{"params": [p]}, {"params": [q], name: whole}], **{name: whole})
    optimizer.add_param_group({"params": [parameter()], name: whole})
    expected = int if scalar is np.int64 else float
    for read in (optimizer.defaults[name], *(group[name] for group in optimizer.param_groups)):
        parts = read if isinstance(field.default, tuple) else (read,)
        assert [type(part) for part in parts] == [expected] * len(parts)
        assert all(part == value for part in parts)


def test_numpy_bools_become_plain_python() -> None:
    optimizer = Adam([parameter()], amsgrad=np.bool_(True), maximize=np.bool_(False))
    assert optimizer.defaults["amsgrad"] is True
    assert optimizer.defaults["maximize"] is False


def test_a_list_of_betas_becomes_a_tuple_and_tensors_become_0d() -> None:
    assert Adam([parameter()], betas=[0.8, 0.9]).defaults["betas"] == (0.8, 0.9)
    betas = Adam([parameter()], betas=(torch.tensor([0.8]), torch.tensor([0.9]))).defaults["betas"]
    assert [b.dim() for b in betas] == [0, 0]


def test_the_tensor_learning_rate_given_is_the_one_kept() -> None:
    lr = torch.tensor(0.1)
    optimizer = AdamW([parameter()], lr=lr)
    assert optimizer.param_groups[0]["lr"] is lr
    assert optimizer.defaults["lr"] is lr


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
        *("maximize", "foreach", "differentiable", "fused", "cautious", "compiled"),
    ]
    refused(ValueError, Lion, "lr", -1.0, "-1.0", "at least 0")
    refused(ValueError, Lion, "betas", (0.9, 1.0), "beta2", "[0, 1)")
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


def test_option_sets_hold_more_than_the_defaults() -> None:
    assert all(len(unique_option_sets(cls)) > 1 for cls in CLASSES)
