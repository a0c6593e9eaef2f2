"""``capturable=True``: step counts and all that follows from them stay on the device, where no step waits for them.

There is no graph to capture on CPU, where such a step is refused. Beyond that refusal its arithmetic is the same as on
any device, and so are the reads of a value that would make the host wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from beside_torch import assert_same, parameter, state_of
from cases import CLASSES, named, rich_options, with_all_numbers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compiled_optim import NAdam
from compiled_optim._engine.executions import clipping

CAPTURABLE = [cls for cls in CLASSES if "capturable" in cls.rule.declaration.options]
EACH = [(cls, o) for cls in CAPTURABLE for o in ({}, with_all_numbers(cls, rich_options(cls)))]
each = pytest.mark.parametrize(("cls", "options"), EACH, ids=[f"{c.__name__}-{named(o)}" for c, o in EACH])
each_class = pytest.mark.parametrize("cls", CAPTURABLE, ids=lambda cls: cls.__name__)
SHAPES = [(3, 5), (), (0, 2), (7,), (130, 130)]  # the last is large enough to be updated by itself
STEPS = 12  # RAdam rectifies from the sixth


@pytest.fixture
def unrefused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capturable steps on CPU."""
    monkeypatch.setattr("compiled_optim._engine.executions.survey.refuse", lambda optimizer, choices: None)


class NoValueIsRead(TorchDispatchMode):
    """Raises for what makes the host wait for a device."""

    WAITS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def train(
    cls: Any, options: dict[str, Any], start: Sequence[Tensor], gradients: list[list[Tensor | None]], watched: int = 0
) -> list[Any]:
    """Parameters and state after steps with these gradients; from the step ``watched`` on, no value may be read."""
    params = [parameter(t) for t in start]
    optimizer = cls(params, **options)
    for i, step in enumerate(gradients):
        for p, g in zip(params, step, strict=True):
            p.grad = g
        if options.get("capturable") and i >= watched:
            with NoValueIsRead():
                optimizer.step()
        else:
            optimizer.step()
    return [(p.detach(), state_of(optimizer, p)) for p in params]


def agree(actual: list[Any], expected: list[Any], rtol: float) -> None:
    for (p, state), (q, reference) in zip(actual, expected, strict=True):
        assert_same(p, q, rtol, "parameter")
        assert state.keys() == reference.keys()
        for name, value in reference.items():
            assert_same(state[name], value, rtol, name)
            assert state[name].dtype == value.dtype


def given(dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """Parameters, and gradients of which some are missing, so that step counts differ within a list."""
    start = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    gradients = [[None if i and i % 4 == j else torch.randn_like(t) for j, t in enumerate(start)] for i in range(STEPS)]
    return start, gradients


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@each_class
def test_it_is_refused_on_cpu(cls: Any, compiled: bool) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = cls([p], capturable=True, compiled=compiled)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"capturable=True .* cpu"):
            optimizer.step()
    assert not optimizer.state
    assert p.tolist() == [1.0] * 3


@pytest.mark.usefixtures("unrefused")
@pytest.mark.parametrize("foreach", [None, False])
@each
def test_float64(cls: Any, options: dict[str, Any], foreach: bool | None) -> None:
    """The results of the host's arithmetic, and no value is read from the first step on."""
    torch.set_default_dtype(torch.float64)
    options = {**options, "foreach": foreach}
    start, gradients = given(torch.float64)
    agree(
        train(cls, {**options, "capturable": True}, start, gradients),
        train(cls, options, start, gradients),
        1e-12,
    )


@pytest.mark.usefixtures("unrefused")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@each_class
def test_other_dtypes(cls: Any, dtype: torch.dtype) -> None:
    """With float32 counts, and so float32 arithmetic on them, as in torch.optim."""
    options = rich_options(cls)
    start, gradients = given(dtype)
    agree(
        train(cls, {**options, "capturable": True}, start, gradients),
        train(cls, options, start, gradients),
        0.05 if dtype is torch.bfloat16 else 1e-3,
    )


@pytest.mark.usefixtures("unrefused")
@each_class
def test_a_tensor_lr(cls: Any) -> None:
    torch.set_default_dtype(torch.float64)
    start, gradients = given(torch.float64)
    capturable = train(cls, {"lr": torch.tensor(0.05), "capturable": True}, start, gradients, watched=1)
    agree(capturable, train(cls, {"lr": 0.05}, start, gradients), 1e-12)


@pytest.mark.usefixtures("unrefused")
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05, dtype=torch.float64)], ids=["number", "tensor"])
def test_graphs_of_lists(lr: Any) -> None:
    """With counts that differ and, in NAdam, a value that is carried beside them."""
    torch.set_default_dtype(torch.float64)
    start, gradients = given(torch.float64)
    # no value can be watched inside of a graph
    compiled = train(NAdam, {"lr": lr, "capturable": True, "compiled": "foreach"}, start, gradients, watched=STEPS)
    agree(compiled, train(NAdam, {"lr": 0.05}, start, gradients), 1e-12)


@pytest.mark.usefixtures("unrefused")
@pytest.mark.parametrize(
    ("capturable", "there"),
    [(True, False), (True, True), (False, True)],
    ids=["number", "device", "counted on the host"],
)
def test_graphs_of_lists_that_clip_and_average(capturable: bool, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor of the gradients comes as a number, or as a tensor on the device (``there``)."""
    torch.set_default_dtype(torch.float64)
    begin = clipping.begin

    def on_device(work: Any, *args: Any, **options: Any) -> bool:
        taken = begin(work, *args, **options)
        work.given["grad_factor"] = torch.tensor(work.given["grad_factor"])
        return taken

    start = [torch.randn(shape) for shape in SHAPES[:2]]
    gradients: list[Any] = [[torch.randn_like(t) for t in start] for _ in range(4)]
    around = {"max_grad_norm": 0.5, "ema_decay": 0.75}
    options = {**around, "capturable": capturable, "compiled": "foreach"}
    with monkeypatch.context() as patch:
        if there:
            patch.setattr(clipping, "begin", on_device)
        compiled = train(NAdam, options, start, gradients, watched=STEPS)
    agree(compiled, train(NAdam, around, start, gradients), 1e-12)


@pytest.mark.usefixtures("unrefused")
@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
@each_class
def test_a_parameter_listed_twice(cls: Any) -> None:
    torch.set_default_dtype(torch.float64)
    results = []
    for capturable in (True, False):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(4))
        optimizer = cls([p, p], capturable=capturable)
        for _ in range(STEPS // 2):
            p.grad = torch.randn(4)
            if capturable:
                with NoValueIsRead():
                    optimizer.step()
            else:
                optimizer.step()
        results.append([(p.detach(), state_of(optimizer, p))])
    agree(*results, 1e-12)


@pytest.mark.usefixtures("unrefused")
@pytest.mark.parametrize(
    "cls", [c for c in CAPTURABLE if "differentiable" in c.rule.declaration.options], ids=lambda c: c.__name__
)
def test_differentiable(cls: Any) -> None:
    torch.set_default_dtype(torch.float64)
    start, gradients = given(torch.float64)
    params = [t.clone() for t in start]
    optimizer = cls(params, capturable=True, differentiable=True)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        with NoValueIsRead():
            optimizer.step()
    agree([(p, state_of(optimizer, p)) for p in params], train(cls, {}, start, gradients), 1e-12)


@each_class
def test_other_steps_do_read_values(cls: Any) -> None:
    """So that the tests above can fail."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoValueIsRead():
        cls([p]).step()


@each
def test_on_a_device_without_values(cls: Any, options: dict[str, Any]) -> None:
    """Where there is no value to be read, nor an operation that mixes devices; steps are lists of tensors there."""
    params = [torch.nn.Parameter(torch.randn(shape, device="meta")) for shape in SHAPES]
    optimizer = cls(params, capturable=True, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    for p in params:
        assert all(value.device.type == "meta" for value in state_of(optimizer, p).values())
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.state[params[0]]["step"].item()
