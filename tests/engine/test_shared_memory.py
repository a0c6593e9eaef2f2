"""Memory that several tensors of a compiled step share: they are updated one after the other, as torch's loop does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from beside_torch import Lockstep, assert_same, set_gradients
from cases import ELEMENTWISE, oracle, rich_options, tolerance
from torch import Tensor

from compiled_optim import SGD, Adam, CompileError, CompileFallbackWarning, NAdam, SparseAdam, explain

N = 30_000  # enough for a team of threads
DENSE = [cls for cls in ELEMENTWISE if cls.accepts_dense]
each_class = pytest.mark.parametrize("cls", DENSE, ids=lambda cls: cls.__name__)
Arrange = Callable[[Any, list[Any]], None]


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Pair(Lockstep):
    """torch's loop over parameters, and ours compiled; each parameter is a view that ``views`` makes of one base."""

    def __init__(self, cls: Any, views: Callable[[Tensor], list[Tensor]], base: Tensor, **options: Any) -> None:
        # of it is what torch keeps beside the step count
        torch.set_default_dtype(torch.float64)
        self.cls = cls
        self.bases = [base.clone(), base.clone()]
        self.params = tuple([torch.nn.Parameter(v) for v in views(b)] for b in self.bases)
        loop = {"foreach": False} if cls.accepts_dense else {}
        theirs = oracle(cls)([{"params": [p]} for p in self.params[0]], **options, **loop)
        self.optimizers = (theirs, cls([{"params": [p]} for p in self.params[1]], **options, compiled=True))

    def step(self, count: int = 1, arrange: Arrange = lambda optimizer, params: None) -> None:
        for _ in range(count):
            set_gradients(*self.params)
            self.both(arrange)
            self.step_as_is()
            self.compare()

    def compare(self) -> None:
        rtol = tolerance(self.cls)
        assert_same(self.bases[1], self.bases[0], rtol, "base")
        super().compare(rtol)

    def is_compiled(self) -> bool:
        return {row.execution for row in explain(self.ours)} == {"multi_tensor"}


def same(base: Tensor) -> list[Tensor]:
    return [base, torch.ones(5), base]


def partly(base: Tensor) -> list[Tensor]:
    n = len(base)
    return [base[n // 3 :], torch.ones(5), base[: n // 2], base[n // 4 : n // 4 + 7]]


def neighbours(base: Tensor) -> list[Tensor]:
    return list(base.split(len(base) // 3))


def apart(base: Tensor) -> list[Tensor]:
    return [base, base + 1, base - 1]


@pytest.mark.parametrize("views", [same, partly, neighbours], ids=lambda f: f.__name__)
@each_class
def test_parameters(cls: Any, views: Any) -> None:
    run = Pair(cls, views, torch.randn(N, dtype=torch.float64), **rich_options(cls))
    run.step(3)
    assert run.is_compiled()
    assert len(run.ours._execution.rebuilt) == 1


def gradient_is_shared(_: Any, params: list[Any]) -> None:
    params[2].grad = params[0].grad


def gradient_is_a_parameter(_: Any, params: list[Any]) -> None:
    params[1].grad = params[0].detach()  # which is updated before
    params[0].grad = params[2].detach()  # and this after


def gradient_is_state(optimizer: Any, params: list[Any]) -> None:
    for p, q in ((0, 1), (2, 0)):
        moment = [v for k, v in optimizer.state[params[p]].items() if v.shape == params[p].shape][-1]
        params[q].grad = moment


@pytest.mark.parametrize(
    "arrange", [gradient_is_shared, gradient_is_a_parameter, gradient_is_state], ids=lambda f: f.__name__
)
@each_class
def test_gradients(cls: Any, arrange: Arrange) -> None:
    """Also where they come to lie in what is written only after some steps, and lie elsewhere again."""
    run = Pair(cls, apart, torch.randn(N, dtype=torch.float64), **rich_options(cls))
    run.step()
    plan = run.ours._execution.plan
    run.step(2, arrange)
    run.step()
    assert run.is_compiled()
    assert run.ours._execution.plan is plan


@each_class
def test_state(cls: Any) -> None:
    def share(optimizer: Any, params: list[Any]) -> None:
        for name in cls.rule.declaration.kept(optimizer_switches, torch.float32):
            optimizer.state[params[2]][name] = optimizer.state[params[0]][name]

    run = Pair(cls, apart, torch.randn(N, dtype=torch.float64), **rich_options(cls))
    optimizer_switches = run.ours._work().read()[0].switches
    run.step()
    run.both(share)
    run.step(2)
    assert run.is_compiled()


@pytest.mark.parametrize("cls", [c for c in DENSE if c.rule.declaration.counts == ("step",)], ids=lambda c: c.__name__)
def test_a_step_count_counts_each_update(cls: Any) -> None:
    def share(optimizer: Any, params: list[Any]) -> None:
        for p in params[1:]:
            optimizer.state[p]["step"] = optimizer.state[params[0]]["step"]

    run = Pair(cls, apart, torch.randn(N, dtype=torch.float64), **rich_options(cls))
    run.step()
    run.both(share)
    run.step(2)
    assert run.ours.state[run.params[1][0]]["step"] == 7
    assert run.is_compiled()


def test_parameters_come_to_share_memory_and_part_again() -> None:
    run = Pair(Adam, apart, torch.randn(N, dtype=torch.float64))
    run.step(2)
    plan = run.ours._execution.plan
    run.both(lambda _, params: setattr(params[2], "data", params[0].data))
    run.step(2)
    run.both(lambda _, params: setattr(params[2], "data", params[0].data + 1))
    run.step(2)
    assert run.ours._execution.plan is plan


def test_one_of_them_has_no_gradient_in_some_steps() -> None:
    run = Pair(Adam, same, torch.randn(N, dtype=torch.float64))
    for missing in (0, 2, 0, 1):
        run.step(1, lambda _, params, missing=missing: setattr(params[missing], "grad", None))
        run.step()
    assert run.is_compiled()


def test_complex_parameters_and_their_real_views() -> None:
    run = Pair(
        Adam, lambda base: [base, torch.view_as_real(base)[5:], base[3:]], torch.randn(N, dtype=torch.complex128)
    )
    run.step(3)
    assert run.is_compiled()


@pytest.mark.parametrize("offset", [0, 1, -1], ids=["equal", "after", "before"])
def test_a_gradient_in_the_memory_of_its_own_parameter(offset: int) -> None:
    """It counts as it was before the step, however the work is cut into parts."""
    results = []
    for alias in (False, True):
        base = torch.randn(N + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        p = torch.nn.Parameter(base[1:-1])
        optimizer = Adam([p], compiled=True)
        for _ in range(3):
            gradient = base[1 + offset : N + 1 + offset]
            p.grad = gradient if alias else gradient.clone()
            optimizer.step()
        results.append(base)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_rows_of_sparse_gradients() -> None:
    def sparse(_: Any, params: list[Any]) -> None:
        for p in params:
            p.grad = p.grad.to_sparse(1)

    run = Pair(SparseAdam, lambda base: [base[:4000], base[2000:], base[1000:1001]], torch.randn(6000, 5).double())
    run.step(3, sparse)
    assert run.is_compiled()


def test_a_sparse_gradient_whose_values_are_its_parameter() -> None:
    results = []
    for alias in (False, True):
        p = torch.nn.Parameter(torch.arange(6000.0).view(3000, 2))
        optimizer = SGD([p], lr=0.5, compiled=True)
        values = p.detach()[:2000] if alias else p.detach()[:2000].clone()
        p.grad = torch.sparse_coo_tensor(torch.arange(1, 2001)[None], values, p.shape, check_invariants=True)
        optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=0)


# ---- what a launch cannot do as the loop does is left to an eager step


def refused(run: Pair, reason: str) -> None:
    before = [p.detach().clone() for p in run.params[1]]
    set_gradients(*run.params)
    with pytest.raises(CompileError, match=reason):
        run.ours.step()
    torch.testing.assert_close([p.detach() for p in run.params[1]], before, rtol=0, atol=0)


def test_a_parameter_in_its_own_state() -> None:
    run = Pair(Adam, apart, torch.randn(N, dtype=torch.float64))
    run.step()
    run.ours.state[run.params[1][1]]["exp_avg"] = run.params[1][1].detach()
    refused(run, r"memory is also that of its own state")


def test_what_is_carried_beside_the_step_count() -> None:
    run = Pair(NAdam, apart, torch.randn(N, dtype=torch.float64))
    run.step()
    first, second, _ = run.params[1]
    run.ours.state[second]["mu_product"] = run.ours.state[first]["mu_product"]
    refused(run, r"carried beside it, is also the memory of another")


def test_a_step_count_in_another_parameter() -> None:
    run = Pair(Adam, apart, torch.randn(N, dtype=torch.float64))
    run.step()
    first, second, _ = run.params[1]
    run.ours.state[second]["step"] = first.detach()[3]
    refused(run, r"carried beside it, is also the memory of another")


@pytest.mark.usefixtures("lenient")
def test_with_a_parameter_that_is_updated_eagerly() -> None:
    """In the order of the param groups, and so eagerly too, and with it what overlaps that."""

    def views(base: Tensor) -> list[Tensor]:
        rows = base.view(-1, 10)
        return [base[:100], base[50:], rows[:, ::2], base[-20:].clone()]

    run = Pair(SGD, views, torch.randn(N, dtype=torch.float64), momentum=0.9)
    with pytest.warns(CompileFallbackWarning) as caught:
        run.step()
    told = [str(w.message) for w in caught]
    assert len(told) == 2
    assert "2 parameters" in told[0]
    assert "shares memory with a parameter that is updated eagerly" in told[0]
    run.step(2)
    rows = list(explain(run.ours))
    assert sum(row.tensors for row in rows if row.execution == "eager") == 3
    assert sum(row.tensors for row in rows if row.execution == "multi_tensor") == 1


@pytest.mark.usefixtures("lenient")
def test_comes_to_share_memory_with_a_parameter_that_is_updated_eagerly() -> None:
    run = Pair(SGD, lambda base: [base.view(-1, 10)[:, ::2], base + 1], torch.randn(N, dtype=torch.float64))
    with pytest.warns(CompileFallbackWarning, match="overlap or leave gaps"):
        run.step(2)
    run.both(lambda _, params: setattr(params[1], "data", params[0].data.as_strided((50,), (1,), 7)))
    with pytest.warns(CompileFallbackWarning, match=r"shape \(50,\).*shares memory with a parameter"):
        run.step()
    run.step()
