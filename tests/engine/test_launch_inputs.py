"""What a launch finds in the place of last step's tensors ends in an error or in another plan, never in a crash."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import Lockstep, tensors
from torch import Tensor

from compiled_optim import SGD, Adam, NAdam, Optimizer, SparseAdam
from compiled_optim._engine.kernels import registry
from compiled_optim.declare import number
from compiled_optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

silently = pytest.mark.filterwarnings("ignore::compiled_optim.CompileFallbackWarning")


class Subclass(torch.Tensor):
    pass


class SubclassedParameter(torch.nn.Parameter):
    pass


def momentum(shapes: list[tuple[int, ...]]) -> Lockstep:
    return Lockstep(
        lambda params: torch.optim.SGD(params, momentum=0.9),
        lambda params: SGD(params, momentum=0.9, compiled=True),
        tensors(shapes),
    )


def everything(optimizer: Any) -> list[Any]:
    """Parameters and state, bit by bit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [[p.tolist() for p in params], [[v.tolist() for v in optimizer.state[p].values()] for p in params]]


# ---- tensors of another type


@silently
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("layout", [torch.clone, lambda t: t.mT.contiguous().mT], ids=["as it is", "copied"])
def test_a_gradient_becomes_a_subclass(layout: Callable[[Tensor], Tensor], at: int) -> None:
    run = momentum([(4, 6), (3, 2), (5, 5)])
    for make in (lambda g: g, lambda g: g.as_subclass(Subclass), lambda g: g):
        for g in (gradients := [layout(t) for t in tensors([(4, 6), (3, 2), (5, 5)])]):
            g.requires_grad_(False)
        for params, wrapped in zip(run.params, (False, True), strict=True):
            for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
                p.grad = make(g) if wrapped and i == at else g
        run.step_as_is()
        run.compare()


@silently
@pytest.mark.usefixtures("lenient")
def test_an_averaged_parameter_becomes_a_subclass() -> None:
    models = [torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)]
    averages = [
        AveragedModel(models[0], multi_avg_fn=get_ema_multi_avg_fn(0.9), compiled=compiled)
        for compiled in (False, True)
    ]
    models[1].weight = SubclassedParameter(torch.ones(3, 3))
    for model in (models[0], models[0], models[1], models[1], models[0]):
        averages[0].update_parameters(model)
        averages[1].update_parameters(model)
        torch.testing.assert_close(averages[1].module.weight, averages[0].module.weight)


@silently
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", ["step", "exp_avg"])
@pytest.mark.parametrize("value", [None, 3, "text", [1.0], torch.ones(2).as_subclass(Subclass)], ids=str)
def test_state_that_is_no_tensor(name: str, value: Any) -> None:
    """An error that changed nothing or an eager step, and then the next one."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Adam([p], compiled=True)
    p.grad = torch.ones(2)
    optimizer.step()
    kept, optimizer.state[p][name] = optimizer.state[p][name], value
    before = p.tolist()
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError, KeyError):
        after = before
    else:
        after = p.tolist()
    assert p.tolist() == after
    optimizer.state[p][name] = kept
    optimizer.step()
    assert p.tolist() < before


@pytest.mark.parametrize("key", ["\udc80", 3, None, ("a", 1), 2.5, type("Text", (str,), {})("mine")], ids=ascii)
def test_keys_of_state_that_are_not_ours(key: Any) -> None:
    run = momentum([(4, 6), (3,)])
    for optimizer, params in zip(run.optimizers, run.params, strict=True):
        optimizer.state[params[0]] = {key: 1.0, "momentum_buffer": torch.ones_like(params[0])}
    run.step(2)
    run.both(lambda optimizer, params: optimizer.state[params[1]].update({key: torch.ones(2, dtype=torch.float64)}))
    run.step(2)
    run.compare()
    assert run.ours.state[run.params[1][0]][key] == 1


# ---- storages that end before their tensors


def parts(optimizer: Any, p: Tensor) -> dict[str, Tensor]:
    assert p.grad is not None
    return {"data": p, "gradient": p.grad, **{f"state '{k}'": v for k, v in optimizer.state[p].items()}}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("left", [0, 8, 40])
@pytest.mark.parametrize("part", ["data", "gradient", "state 'step'", "state 'exp_avg_sq'", "state 'mu_product'"])
def test_a_storage_is_too_short(part: str, left: int, compiled: bool) -> None:
    if left and part in ("state 'step'", "state 'mu_product'"):
        left = 2
    params = [torch.nn.Parameter(t.float()) for t in tensors([(5,), (5, 7), ()])]
    optimizer = NAdam([{"params": params[:1]}, {"params": params[1:]}], compiled=compiled)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    storage = parts(optimizer, params[1])[part].untyped_storage()
    others = [p for p in params if p is not params[1]]
    before = [[p.tolist(), *(v.tolist() for v in optimizer.state[p].values())] for p in others]
    whole = storage.nbytes()
    kept = torch.empty(whole, dtype=torch.uint8)
    kept.untyped_storage().copy_(storage)
    storage.resize_(left)
    message = (
        rf"the {part} of the parameter of shape \(5, 7\) at index 0 of param group 1 needs .* {whole} .* has {left}"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert [[p.tolist(), *(v.tolist() for v in optimizer.state[p].values())] for p in others] == before
    storage.resize_(whole)
    storage.copy_(kept.untyped_storage())
    assert optimizer.state[params[1]]["step"] == 2
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 3, 3]


@pytest.mark.parametrize("part", ["gradient", "data"])
def test_a_storage_is_too_short_in_the_first_step(part: str) -> None:
    p, q = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    p.grad, q.grad = torch.ones(5), torch.ones(5)
    optimizer = SGD([p, q], compiled=True)
    (q.grad if part == "gradient" else q).untyped_storage().resize_(12)
    with pytest.raises(RuntimeError, match=rf"the {part} of the parameter of shape \(5,\) at index 1 of param group 0"):
        optimizer.step()
    assert p.tolist() == [1.0] * 5


@pytest.mark.parametrize("compiled", [True, False])
def test_a_storage_of_a_gradient_that_is_to_be_clipped_is_too_short(compiled: bool) -> None:
    p, q = (torch.nn.Parameter(torch.ones(n)) for n in (3, 5))
    optimizer = SGD([p, q], compiled=compiled, max_grad_norm=1.0)
    p.grad, q.grad = torch.ones(3), torch.ones(5)
    q.grad.untyped_storage().resize_(12)
    with pytest.raises(RuntimeError, match=r"SGD: the gradient of the parameter of shape \(5,\) at index 1 .* has 12"):
        optimizer.step()
    assert p.tolist() == [1.0] * 3


@pytest.mark.parametrize("left", [0, 12])
def test_a_storage_of_a_gradient_that_is_copied_is_too_short(left: int) -> None:
    p = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = SGD([p], compiled=True)
    for _ in range(2):
        p.grad = torch.ones(6, 4).mT
        optimizer.step()
    p.grad.untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match=rf"the gradient of .* needs a storage of 96 bytes, .* has {left}"):
        optimizer.step()


@pytest.mark.parametrize(("part", "left"), [("values", 0), ("values", 8), ("indices", 0), ("indices", 8)])
def test_a_storage_of_a_sparse_gradient_is_too_short(part: str, left: int) -> None:
    p = torch.nn.Parameter(torch.ones(6, 3))
    optimizer = SparseAdam([p], compiled=True)
    values, indices = torch.ones(2, 3), torch.tensor([[1, 4]])
    p.grad = torch.sparse_coo_tensor(indices, values, (6, 3), check_invariants=True)
    optimizer.step()
    before = everything(optimizer)
    (p.grad._values() if part == "values" else p.grad._indices()).untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match=rf"the gradient.* of the parameter of shape \(6, 3\) .* has {left}"):
        optimizer.step()
    assert everything(optimizer) == before


# ---- Python that runs while a step is under way


def test_a_scalar_whose_conversion_takes_the_gradient_away() -> None:
    """The step is of the gradients that it began with."""
    taken: list[Any] = []

    class Late:
        def __init__(self, value: float) -> None:
            self.value = value

        def __float__(self) -> float:
            for p in taken:
                p.grad = None
            return float(self.value)

    class Plain(Optimizer):
        lr: float = number(default=1.0)

        @staticmethod
        def scalars(h: Any, step: Any) -> dict[str, Any]:
            return {"lr": Late(h.lr)}

        @staticmethod
        def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
            return p - g * k.lr

    params = [torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(2)]
    optimizer = Plain(params, compiled=True)
    for step in range(3):
        if step == 2:
            taken += params
        params[0].grad, params[1].grad = torch.ones(3, 2), torch.ones(2, 3).mT
        optimizer.step()
    torch.testing.assert_close([p.detach() for p in params], [torch.full((3, 2), -3.0)] * 2)
    assert params[0].grad is None


def test_a_scalar_whose_conversion_steps_again() -> None:
    inner: list[int] = []

    class Late:
        def __float__(self) -> float:
            if not inner:
                inner.append(1)
                optimizer.step()
            return 1.0

    class Plain(Optimizer):
        @staticmethod
        def scalars(h: Any, step: Any) -> dict[str, Any]:
            return {"lr": Late()}

        @staticmethod
        def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
            return p - g * k.lr

    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = Plain([p], compiled=True)
    optimizer.step()
    assert p.tolist() == [-2.0] * 3


def test_another_thread_replaces_what_a_launch_uses() -> None:
    """A launch of this size lets other threads run; what they let go of must live until it is over."""
    n = 1 << 20
    p = torch.nn.Parameter(torch.zeros(n))
    optimizer = Adam([p], compiled=True)
    p.grad = torch.ones(n)
    optimizer.step()
    replaced = 0
    over = threading.Event()

    def replace() -> None:
        nonlocal replaced
        state = optimizer.state[p]
        while not over.is_set():
            p.data = torch.zeros(n)
            state["exp_avg"].data = torch.zeros(n)
            state["exp_avg_sq"].set_(torch.zeros(n))
            p.grad = torch.ones(n)
            replaced += 1

    thread = threading.Thread(target=replace)
    thread.start()
    for _ in range(10_000):
        optimizer.step()
        if replaced > 100:
            break
    over.set()
    thread.join()
    assert replaced
    assert bool(p.isfinite().all())


def test_another_thread_resizes_what_a_launch_uses() -> None:
    """Which would free its memory: that raises while a launch is under way, and not after."""
    n = 1 << 20
    p = torch.nn.Parameter(torch.zeros(n))
    optimizer = Adam([p], compiled=True)
    p.grad = torch.ones(n)
    optimizer.step()
    storages = [t.untyped_storage() for t in (p, p.grad, optimizer.state[p]["exp_avg"])]
    refused: list[str] = []
    over = threading.Event()

    def resize() -> None:
        while not over.is_set():
            for storage in storages:
                try:
                    storage.resize_(4 * n + 4)
                    storage.resize_(4 * n)
                except RuntimeError as error:
                    refused.append(str(error))

    thread = threading.Thread(target=resize)
    thread.start()
    for _ in range(10_000):
        optimizer.step()
        if len(refused) > 10:
            break
    over.set()
    thread.join()
    assert "not resizable" in refused[0]
    assert all(storage.resizable() for storage in storages)
    optimizer.step()
    assert bool(p.isfinite().all())


# ---- the host module itself, which is given what it does not expect


def test_the_host_module_raises() -> None:
    host = registry.host_module()
    t = torch.ones(2)
    plan = host.make(("step", "exp_avg"), 1)
    bad: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (host.make, (("\udc80",), 0)),
        (host.make, ((1,), 0)),
        (host.make, (("a",), 2)),
        (host.make, (("a",), -1)),
        (host.add_launch, (object(), 1, t, {}, 1)),
        (host.add_launch, (plan, 0, t, {}, 1)),
        (host.add_launch, (plan, 1, 3, {}, 1)),
        (host.add_launch, (plan, 1, t, {}, 0)),
        (host.add_launch, (plan, 1, t, {1: None}, 1)),
        (host.add_launch, (plan, 1, t, {"x": t}, 1)),
        (host.add_launch, (plan, 1, t, {0: t}, 1)),
        (host.add_launch, (plan, 1, t, {2: t}, 1)),
        (host.add_launch, (plan, 1, t, {-1: t}, 1)),
        (host.add_group, (plan, [3])),
        (host.add_group, (plan, [(t, 0, False)])),
        (host.add_group, (plan, [(t, -3, False)])),
        (host.add_group, (None, [])),
        (host.seal, (None, {})),
        (host.seal, (plan, [])),
        (host.conflicts, ([3], 0)),
        (host.run, (plan, (), {}, [], [], ())),
    ]
    for function, args in bad:
        with pytest.raises((TypeError, ValueError, RuntimeError, UnicodeError, OverflowError)):
            function(*args)
    host.add_group(plan, [(t, -1, False)])
    host.seal(plan, {})
    for args in [
        (plan, [], {}, [], [], ()),
        (plan, (), [], [], [], ()),
        (plan, ([t],), {}, (), [], ()),
        (plan, ([t],), {}, [3], [], ()),
        (plan, ([t],), {}, [(0, (1.0, 2.0), ())], [], ()),
        (plan, ([t],), {}, [(0, ("x",), (1.0,))], [], ()),
        (plan, ([t],), {}, [(-1, (1.0,), (1.0,))], [], ()),
        (plan, ([t],), {}, [(-(2**31), (1.0,), (1.0,))], [], ()),
        (plan, ([t],), {}, [], [3], ()),
        (plan, ([t],), {}, [], [(t,)], ()),
        (plan, ([t],), {}, [], [], 1),
        (plan, ([t],), {}, [], [], (1,)),
        (plan,),
    ]:
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            host.run(*args)
    assert host.run(plan, ([t],), {}, [(0, (1.0,), ("x",))], [], ()) is False  # no number
    assert host.run(plan, ([t],), {}, [], [], ()) is None
