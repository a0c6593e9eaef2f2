"""The first compiled step may come under any mode of torch: it is as compiled as elsewhere, and so are the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import compiled_optim
from compiled_optim._engine.kernels import registry
from compiled_optim._engine.kernels.trace import Signature, trace
from compiled_optim._engine.torch_private import dynamo, inductor


class Functions(TorchFunctionMode):
    """Moves what is made without a device, as a default device does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        return func(*args, **{"device": "meta", **(kwargs or {})} if name in ("empty", "zeros") else kwargs or {})


class Operators(TorchDispatchMode):
    """Moves all that is made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "device": "meta"} if "empty" in str(func) else kwargs)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def inside_a_transform() -> Iterator[None]:
    level = torch._C._functorch._grad_increment_nesting()
    try:
        assert level
        yield
    finally:
        torch._C._functorch._grad_decrement_nesting()


MODES: dict[str, Any] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "device": lambda: torch.device("meta"),
    "default device": default_device,
    "default dtype": default_dtype,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "fake tensors": FakeTensorMode,
    "functions": Functions,
    "operators": Operators,
    "transform": inside_a_transform,
}


def signature() -> Signature:
    cls = compiled_optim.SGD
    choice = cls.rule.declaration.read(cls.rule.declaration.check({}))
    scalars = tuple(cls.scalars(choice.hyper, 1))
    return Signature(cls.rule, choice.switches, (torch.float32,), (), scalars)


@pytest.fixture(scope="module")
def expected() -> str:
    """What lowering gives outside of modes."""
    return inductor.lower_cpp(trace(signature())).source


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_first_compiled_step_under_a_mode(mode: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_host", None)
    registry.forget()
    optimizers = []
    for context in (mode(), torch.enable_grad()):
        p = torch.nn.Parameter(torch.ones(4, device="cpu"))
        p.grad = torch.ones(4, device="cpu")
        optimizers.append(compiled_optim.SGD([p], lr=0.5, compiled=True))
        with context:
            optimizers[-1].step()
        assert p.tolist() == [0.5] * 4
    assert [compiled_optim.explain(o).rows[0].execution for o in optimizers] == ["multi_tensor"] * 2
    with mode():
        assert inductor.lower_cpp(trace(signature())).source == expected


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_outside_modes(mode: Any) -> None:
    """The mode is left, and entered again."""

    def made() -> tuple[Any, ...]:
        tensor = torch.empty(2)
        return type(tensor), tensor.device.type, tensor.is_inference(), torch.is_autocast_enabled("cpu")

    context: AbstractContextManager[Any] = mode()
    with context:
        inside = made()
        with dynamo.outside_modes():
            assert made() == (torch.Tensor, "cpu", False, False)
        assert made() == inside
