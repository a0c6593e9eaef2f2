"""Dtypes of state, float32 masters of half-precision parameters, and rounding at random in their place."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import assert_same, both, executions
from cases import CLASSES, named, oracle, rich_options
from torch import Tensor
from torch.amp import GradScaler

from compiled_optim import SGD, Adagrad, Adam, AdamW, CompileFallbackWarning, SparseAdam, cache_info, explain
from compiled_optim.declare import number
from compiled_optim.optimizer import Optimizer

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
UNIT = 2.0**-20  # a few steps of float32 arithmetic in another order
DENSE = [cls for cls in CLASSES if cls.accepts_dense]
# each kernel takes seconds to compile
COMPILED: list[tuple[Any, dict[str, Any]]] = [(AdamW, {}), (SGD, {"momentum": 0.9}), (Adagrad, {})]
CASES = [(cls, o, False) for cls in DENSE for o in ({}, rich_options(cls))] + [(*case, True) for case in COMPILED]
each_case = pytest.mark.parametrize(
    ("cls", "options", "compiled"),
    CASES,
    ids=[f"{c.__name__}-{named(o)}-{'compiled' if k else 'eager'}" for c, o, k in CASES],
)


def parameters(*dtypes: torch.dtype, shape: tuple[int, ...] = (5, 31)) -> list[Any]:
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for dtype in dtypes]


def give(params: list[Any], *others: list[Any]) -> None:
    """Equal gradients that all their dtypes hold."""
    for p, *qs in zip(params, *others, strict=True):
        p.grad = torch.randn(p.shape).bfloat16().to(p.dtype)
        for q in qs:
            q.grad = p.grad.to(q.dtype)


def buffers(optimizer: Any, p: Any) -> dict[str, Tensor]:
    """The state of the shape of its parameter."""
    return {k: v for k, v in optimizer.state[p].items() if k in optimizer.rule.declaration.buffers}


def wide(params: list[Any]) -> list[Any]:
    return [torch.nn.Parameter(p.detach().float().clone()) for p in params]


def assert_near(actual: Tensor, expected: Tensor, unit: float, what: str) -> None:
    """Within a few rounding errors of numbers that may have nearly cancelled."""
    most = max(1e-3, expected.detach().abs().max().item())
    torch.testing.assert_close(
        actual.detach().float(), expected.detach(), rtol=4 * unit, atol=4 * unit * most, msg=lambda m: f"{what}: {m}"
    )


def saved(optimizer: Any) -> Any:
    """What is read from a file that its ``state_dict`` was saved to."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- master weights


@each_case
def test_the_parameter_is_the_rounded_master(cls: Any, options: dict[str, Any], compiled: bool) -> None:
    """Masters are what torch computes of float32 parameters from the same gradients."""
    params = parameters(BF16, FP32, *((FP16,) if not compiled else ()))
    masters = wide(params)
    ours = cls(params, **options, master_weights=True, compiled=compiled)
    theirs = oracle(cls)(masters, **options)
    for _ in range(4):
        give(params, masters)
        ours.step()
        theirs.step()
    for p, m in zip(params, masters, strict=True):
        state = buffers(ours, p)
        assert ("master" in state) == (p.dtype != FP32)
        assert_near(state.get("master", p), m, UNIT, "master")
        assert torch.equal(p, state.get("master", p).to(p.dtype))
        assert {v.dtype for v in state.values()} <= {FP32}
        for name, value in state.items():
            if name != "master":
                assert_near(value, theirs.state[m][name], UNIT, name)
    assert set(executions(ours)) == {"multi_tensor" if compiled else "eager"}


@both
def test_a_float32_gradient_reaches_the_master_unrounded(compiled: bool) -> None:
    p = torch.nn.Parameter(torch.ones(40, dtype=BF16))
    p.grad_dtype = FP32
    optimizer = SGD([p], lr=0.5, master_weights=True, compiled=compiled)
    expected = torch.ones(40)
    for _ in range(3):
        p.grad = torch.randn(40)
        expected -= 0.5 * p.grad
        optimizer.step()
        assert torch.equal(optimizer.state[p]["master"], expected)
        assert torch.equal(p, expected.to(BF16))
    assert set(executions(optimizer)) == {"multi_tensor" if compiled else "eager"}


@both
def test_a_grad_scaler_and_masters_of_float16(compiled: bool) -> None:
    """torch's scaler does not unscale float16 gradients; the step divides them after they were widened."""
    p, q = torch.nn.Parameter(torch.ones(8, dtype=FP16)), torch.nn.Parameter(torch.ones(8))
    ours, theirs = AdamW([p], lr=0.1, master_weights=True, compiled=compiled), torch.optim.AdamW([q], lr=0.1)
    scaler = GradScaler("cpu", init_scale=2.0**14)
    scaler.scale(torch.zeros(()))
    for grad in (2.0**-20, math.inf, 2.0**-18):
        p.grad, q.grad = (torch.full_like(t, grad).mul_(scaler.get_scale()) for t in (p, q))
        scaler.step(ours)
        if math.isfinite(grad):
            q.grad /= scaler.get_scale()
            theirs.step()
        scaler.update()
    assert_same(ours.state[p]["master"], q, 1e-6)
    assert scaler.get_scale() == 2.0**13


def test_masters_in_a_graph_over_lists_and_in_a_users_graph() -> None:
    params, others, alone = (parameters(BF16, FP32) for _ in range(3))
    for p, q, r in zip(params, others, alone, strict=True):
        q.data.copy_(p)
        r.data.copy_(p)
    eager = AdamW(params, master_weights=True)
    lists = AdamW(others, master_weights=True, compiled="foreach")
    traced = AdamW(alone, master_weights=True)
    step = torch.compile(lambda: traced.step())
    for _ in range(3):
        give(params, others, alone)
        eager.step()
        lists.step()
        step()
    for p, q, r in zip(params, others, alone, strict=True):
        for name, value in buffers(eager, p).items():
            assert_same(buffers(lists, q)[name], value, 1e-5)
            assert_same(buffers(traced, r)[name], value, 1e-5)


@both
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_parameter_that_was_changed_is_taken_over(dtype: torch.dtype, compiled: bool) -> None:
    """As by ``model.load_state_dict``; also where it changed by the least that its dtype can tell apart."""
    start = torch.tensor([1.0, 1.0, 1.0, 1.0, -3.0, 0.0, 0.0, 65000.0, 2e-6])
    p = torch.nn.Parameter(start.to(dtype))
    optimizer = SGD([p], lr=0.5, master_weights=True, compiled=compiled)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    before = optimizer.state[p]["master"].clone()
    eps = torch.finfo(dtype).eps
    changed = torch.tensor([1.0, 1 + eps, 1 - eps / 2, 7.0, -3 + 2 * eps, 1.0, -0.0, math.nan, 2e-6]).to(dtype)
    p.data.copy_(changed)
    optimizer.step()
    torch.testing.assert_close(p.detach(), changed, rtol=0, atol=0, equal_nan=True)
    master = optimizer.state[p]["master"]
    expected = torch.where(changed == start.to(dtype), before, changed.float())
    torch.testing.assert_close(master, expected, rtol=0, atol=0, equal_nan=True)


@both
def test_a_master_keeps_what_rounding_drops(compiled: bool) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=BF16))
    optimizer = SGD([p], lr=2.0**-12, master_weights=True, compiled=compiled)
    for i in range(1, 17):  # a bfloat16 below 1 is 2**-8 away from the next
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(optimizer.state[p]["master"], torch.full((3,), 1 - i * 2.0**-12))
    assert torch.equal(p, torch.full((3,), 1 - 2.0**-8, dtype=BF16))


# ---- the dtype of the moments


@each_case
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
def test_moments_have_the_dtype_that_is_asked_for(
    cls: Any, options: dict[str, Any], compiled: bool, state_dtype: torch.dtype
) -> None:
    """Step counts, and what is carried beside them, keep theirs. A step is float32 arithmetic, rounded at its end."""
    options = {**options, "centered": False} if "centered" in options else options  # a difference of rounded averages
    params = parameters(*((BF16,) if state_dtype is FP32 else (FP32,)))
    (p,), (reference,) = params, wide(params)
    ours = cls(params, **options, state_dtype=state_dtype, compiled=compiled)
    theirs = oracle(cls)([reference], **options)
    for _ in range(3):
        give(params, [reference])
        ours.step()
        theirs.step()
        state = buffers(ours, p)
        assert {v.dtype for v in state.values()} <= {state_dtype}
        for name, value in state.items():
            assert_near(value, theirs.state[reference][name], 2.0**-8 if state_dtype is BF16 else UNIT, name)
            theirs.state[reference][name].copy_(value)
        assert_near(p, reference, 2.0**-8 if p.dtype is BF16 else UNIT, "parameter")
        reference.data.copy_(p)
    assert {v.dtype for k, v in ours.state[p].items() if k not in state} <= {FP32}


def test_moments_beside_masters_and_averages() -> None:
    params = parameters(BF16, FP32, FP64)
    optimizer = AdamW(params, master_weights=True, state_dtype=BF16, ema_decay=0.5)
    give(params)
    optimizer.step()
    kinds = [{k: v.dtype for k, v in buffers(optimizer, p).items()} for p in params]
    moments = {"exp_avg": BF16, "exp_avg_sq": BF16}
    assert kinds == [moments | {"master": FP32, "ema": FP32}, moments | {"ema": FP32}, moments | {"ema": FP64}]


def test_complex_state_stays_complex() -> None:
    p = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    optimizer = AdamW([p], state_dtype=BF16, master_weights=True)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert {k: v.dtype for k, v in buffers(optimizer, p).items()} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq"), torch.complex64
    )


def test_a_param_group_that_is_added_has_them_too() -> None:
    params = parameters(BF16, BF16)
    optimizer = AdamW(params[:1], master_weights=True, compiled=True)
    give(params)
    optimizer.step()
    optimizer.add_param_group({"params": params[1:], "lr": 0.1})
    give(params)
    optimizer.step()
    assert {v.dtype for v in buffers(optimizer, params[1]).values()} == {FP32}
    assert set(buffers(optimizer, params[1])) == {"exp_avg", "exp_avg_sq", "master"}


def test_memory_is_told() -> None:
    params = parameters(BF16, FP32, BF16)
    optimizer = AdamW(params, master_weights=True)
    assert explain(optimizer).state == []
    give(params)
    optimizer.step()
    narrow, full = explain(optimizer).state
    assert (narrow.dtype, narrow.elements, narrow.bytes_per_element) == ("bfloat16", 310, 12)
    assert narrow.buffers == dict.fromkeys(("exp_avg", "exp_avg_sq", "master"), "float32")
    assert (full.dtype, full.elements, full.bytes_per_element) == ("float32", 155, 8)
    assert "state of 155 float32 elements: 8 bytes each (exp_avg float32, exp_avg_sq float32)" in str(
        explain(optimizer)
    )


# ---- rows of sparse gradients


@both
@pytest.mark.parametrize("cls", [SGD, SparseAdam], ids=lambda cls: cls.__name__)
def test_masters_of_the_rows_that_a_gradient_touches(cls: Any, compiled: bool) -> None:
    p = torch.nn.Parameter(torch.randn(6, 3).to(BF16))
    q = torch.nn.Parameter(p.detach().float())
    ours, theirs = cls([p], lr=0.1, master_weights=True, compiled=compiled), oracle(cls)([q], lr=0.1)
    for rows in ([0, 2, 4], [4, 1, 5]):
        values = torch.randn(3, 3).to(BF16)
        p.grad = torch.sparse_coo_tensor(torch.tensor([rows]), values, p.shape)
        q.grad = torch.sparse_coo_tensor(torch.tensor([rows]), values.float(), p.shape)
        ours.step()
        theirs.step()
    assert_same(ours.state[p]["master"], q, 1e-6)
    assert torch.equal(p, ours.state[p]["master"].to(BF16))
    assert set(executions(ours)) == {"multi_tensor" if compiled else "eager"}


# ---- checkpoints


@both
@pytest.mark.parametrize(
    "around", [{"master_weights": True}, {"state_dtype": FP32}, {"stochastic_rounding": 7}], ids=str
)
def test_training_goes_on_from_a_checkpoint_bit_by_bit(around: dict[str, Any], compiled: bool) -> None:
    params = parameters(BF16, FP32)
    optimizer = AdamW(params, lr=0.01, compiled=compiled, **around)
    for _ in range(3):
        give(params)
        optimizer.step()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = AdamW(others, lr=0.01, compiled=compiled, **around)
    resumed.load_state_dict(saved(optimizer))
    for _ in range(2):
        give(params, others)
        optimizer.step()
        resumed.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][name])
            assert value.dtype == resumed.state[q][name].dtype


@pytest.mark.parametrize("state_dtype", [None, FP32, BF16], ids=str)
def test_checkpoints_of_torch_and_for_torch(state_dtype: torch.dtype | None) -> None:
    """A checkpoint of torch has no masters: they are made. Torch casts what it loads to its parameters' dtype."""
    params = parameters(BF16, FP32)
    theirs = torch.optim.Adam(params)
    give(params)
    theirs.step()
    ours = Adam(params, master_weights=True, state_dtype=state_dtype)
    ours.load_state_dict(saved(theirs))
    dtype = state_dtype or FP32
    for p in params:
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.state[p][name], theirs.state[p][name].to(dtype))
            assert ours.state[p][name].dtype is dtype
    before = params[0].detach().float()
    for p in params:
        p.grad.zero_()
    ours.param_groups[0]["lr"] = 0.0
    ours.step()
    assert torch.equal(ours.state[params[0]]["master"], before)
    theirs.load_state_dict(saved(ours))
    assert theirs.state[params[0]]["exp_avg"].dtype is BF16
    theirs.step()


def test_masters_go_with_the_optimizer_that_loses_them() -> None:
    """What a checkpoint does not hold is made anew from the parameter, not kept from before."""
    (p,) = parameters(BF16)
    optimizer, plain = AdamW([p], master_weights=True), AdamW([p])
    give([p])
    plain.step()
    optimizer.step()
    optimizer.load_state_dict(plain.state_dict())
    assert "master" not in optimizer.state[p]
    p.grad.zero_()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.state[p]["master"], p.float())


def test_a_load_that_raises_changes_nothing() -> None:
    (p,) = parameters(BF16)
    optimizer = AdamW([p], master_weights=True)
    give([p])
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[p].items()}
    checkpoint = saved(optimizer)
    checkpoint["state"][0]["exp_avg"].fill_(7.0)

    def refuse(_: Any) -> None:
        assert optimizer.state[p]["exp_avg"].dtype is FP32  # hooks see what is loaded
        raise RuntimeError("refused")

    hook = optimizer.register_load_state_dict_post_hook(refuse)
    with pytest.raises(RuntimeError, match="refused"):
        optimizer.load_state_dict(checkpoint)
    assert all(torch.equal(optimizer.state[p][k], v) for k, v in before.items())
    hook.remove()
    with pytest.raises(TypeError, match="'state' of parameter 0 must be a dict"):
        optimizer.load_state_dict({**checkpoint, "state": {0: [torch.ones(5, 31)]}})
    assert all(torch.equal(optimizer.state[p][k], v) for k, v in before.items())

    def halve(_: Any, state_dict: Any) -> Any:
        state = {0: {**state_dict["state"][0], "exp_avg": torch.full((5, 31), 1 + 2.0**-20)}}
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(checkpoint)
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.full((5, 31), 1 + 2.0**-20))


@pytest.mark.parametrize("around", [{"master_weights": True}, {"stochastic_rounding": 7}], ids=str)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: torch.load(_pickled(o), weights_only=False)])
def test_copies_go_on_alike(duplicate: Callable[[Any], Any], around: dict[str, Any]) -> None:
    params = parameters(BF16)
    optimizer = AdamW(params, **around)
    give(params)
    optimizer.step()
    other = duplicate(optimizer)
    copied = other.param_groups[0]["params"]
    give(params, copied)
    optimizer.step()
    other.step()
    assert torch.equal(params[0], copied[0])
    for name, value in optimizer.state[params[0]].items():
        assert torch.equal(value, other.state[copied[0]][name])


def _pickled(optimizer: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return file


# ---- rounding at random


def rounded(fraction: float, elements: int, **options: Any) -> Tensor:
    """Where ones went up that were to grow by this fraction of what separates bfloat16 numbers there."""
    p = torch.nn.Parameter(torch.ones(elements, dtype=BF16))
    p.grad = torch.ones_like(p)
    SGD([p], lr=fraction / 128, maximize=True, **options).step()
    up = (p.detach().float() - 1) * 128
    assert set(up.unique().tolist()) <= {0.0, 1.0}
    return up


@both
@pytest.mark.parametrize("fraction", [2.0**-12, 0.1, 0.5, 0.9])
def test_the_mean_is_what_it_would_be(fraction: float, compiled: bool) -> None:
    """Over equal elements of one step, and over the steps of one element: within 5 standard deviations."""
    n = 200_000
    deviation = math.sqrt(fraction * (1 - fraction) / n)
    up = rounded(fraction, n, stochastic_rounding=True, compiled=compiled)
    assert abs(up.mean().item() - fraction) < 5 * deviation
    if fraction == 0.5:  # neighbours do not depend on each other
        assert abs((up[1:] == up[:-1]).float().mean().item() - 0.5) < 5 * deviation
    seeds = torch.stack([rounded(fraction, 50, stochastic_rounding=seed) for seed in range(1000)])
    assert abs(seeds.mean().item() - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / seeds.numel())
    by_element = seeds.mean(0) - fraction
    assert by_element.abs().max() < 5.5 * math.sqrt(fraction * (1 - fraction) / 1000) + 2e-3


def test_a_small_update_is_not_lost() -> None:
    """By steps of a hundredth of what rounding to nearest keeps, as far as float32 parameters go."""
    p = torch.nn.Parameter(torch.ones(4000, dtype=BF16))
    q = torch.nn.Parameter(torch.ones(4000, dtype=BF16))
    ours, nearest = SGD([p], lr=2.0**-14, stochastic_rounding=1), SGD([q], lr=2.0**-14)
    steps = 512
    for _ in range(steps):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        ours.step()
        nearest.step()
    assert torch.equal(q, torch.ones_like(q))
    # each step adds at most a quarter of 2**-8 squared to the variance
    deviation = 2.0**-9 * math.sqrt(steps / 4000)
    assert abs(p.detach().double().mean().item() - (1 - steps * 2.0**-14)) < 5 * deviation / 4


SHAPES: list[tuple[int, ...]] = [(40_003,), (), (8, 3, 5, 5), (3, 0), (1,), (700, 7)]


def rounding_run(steps: int, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(BF16) for shape in SHAPES]
    values[2] = values[2].contiguous(memory_format=torch.channels_last)
    params = [torch.nn.Parameter(v) for v in values]
    optimizer = AdamW(params, lr=1e-3, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(BF16)
        optimizer.step()
    return [p.detach() for p in params]


def test_every_execution_rounds_alike() -> None:
    """Also with another number of threads, and where an eager step cuts large tensors."""
    expected = rounding_run(3, stochastic_rounding=9)
    for options in ({"compiled": True}, {"foreach": False}, {"compiled": "foreach"}):
        actual = rounding_run(3, stochastic_rounding=9, **options)
        differing = sum(int((a != e).sum()) for a, e in zip(actual, expected, strict=True))
        assert differing <= 2  # where a rounding error of float32 makes the difference
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = rounding_run(3, stochastic_rounding=9, compiled=True)
        torch.set_num_threads(3)
        assert all(map(torch.equal, alone, rounding_run(3, stochastic_rounding=9, compiled=True)))
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(rounding_run(3, stochastic_rounding=8)[0], expected[0])


def test_a_seed_is_in_no_kernel() -> None:
    rounded(0.5, 8, stochastic_rounding=1, compiled=True)
    before = cache_info()
    for seed in (2, 2**80, -5, 0):
        rounded(0.5, 8, stochastic_rounding=seed, compiled=True)
    after = cache_info()
    assert (after.misses, after.disk_hits) == (before.misses, before.disk_hits)


@both
def test_other_values_are_as_they_are(compiled: bool) -> None:
    """Values that are not finite, values that bfloat16 holds, and parameters of other dtypes."""
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.5, -3e38, 1e-40])
    p, q = torch.nn.Parameter(values.to(BF16)), torch.nn.Parameter(torch.linspace(0, 1, 8))
    p.data[:1].view(torch.int16).fill_(0x7FFF)  # a NaN that would overflow
    r = torch.nn.Parameter(q.detach().clone())
    optimizer, plain = (SGD([*ts], lr=0.1, compiled=compiled, **o) for ts, o in (((p, q), SEED), ((r,), {})))
    p.grad, q.grad, r.grad = torch.zeros_like(p), torch.ones(8), torch.ones(8)
    before = p.detach().clone()
    optimizer.step()
    plain.step()
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(q, r)


SEED: dict[str, Any] = {"stochastic_rounding": 3}


class Drift(Optimizer):
    """A user's rule."""

    rate: float = number(default=0.25)

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"rate": h.rate}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - g * k.rate / 128


def test_a_users_rule_is_rounded_and_has_masters() -> None:
    (p, q), (r, s) = parameters(BF16, BF16), parameters(BF16, BF16)
    r.data.copy_(p)
    s.data.copy_(q)
    for options in (SEED, {"master_weights": True}):
        eager, compiled = Drift([p, q], **options), Drift([r, s], compiled=True, **options)
        for _ in range(3):
            give([p, q], [r, s])
            eager.step()
            compiled.step()
        assert set(executions(compiled)) == {"multi_tensor"}
        assert torch.equal(p, r)
        assert torch.equal(q, s)


@pytest.mark.usefixtures("lenient")
def test_rows_are_rounded_eagerly() -> None:
    params = parameters(BF16, BF16)
    params[1].data.copy_(params[0])
    grad = torch.sparse_coo_tensor(torch.tensor([[0, 3]]), torch.randn(2, 31).to(BF16), (5, 31))
    eager, compiled = SGD(params[:1], **SEED), SGD(params[1:], compiled=True, **SEED)
    params[0].grad = params[1].grad = grad
    eager.step()
    with pytest.warns(CompileFallbackWarning, match="depends on the place in the whole parameter"):
        compiled.step()
    assert torch.equal(*params)
