"""Clipping, skipping and averages within the step, against the separate passes of torch."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import assert_same, both, executions, parameters, set_gradients, state_of
from cases import CLASSES, FEW, KINDS, named, oracle, rich_options
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compiled_optim import SGD, Adam, AdamW, SparseAdam, cache_info, explain
from compiled_optim.lr_scheduler import StepLR

DENSE = [(cls, options) for cls, options in FEW if cls.accepts_dense and (cls.elementwise or not options)]
each = pytest.mark.parametrize(("cls", "options"), DENSE, ids=[f"{c.__name__}-{named(o)}" for c, o in DENSE])
each_kind = pytest.mark.parametrize("cls", [c for c in KINDS if c.accepts_dense], ids=lambda cls: cls.__name__)


@pytest.fixture(autouse=True)
def _float64() -> None:
    """What torch carries from step to step has the default dtype; the fixture of all tests sets it back."""
    torch.set_default_dtype(torch.float64)


def states(optimizer: Any, params: list[Any]) -> list[Any]:
    return [state_of(optimizer, p) for p in params]


class Beside:
    """A model whose optimizer does all in one pass, and its copy with the passes of torch."""

    def __init__(self, cls: Any, options: dict[str, Any], norm_type: float = 2.0, **around: Any) -> None:
        self.params, self.theirs = parameters(2)
        groups = [{"params": self.params[:1]}, {"params": self.params[1:]}]
        self.around, self.norm_type = around, norm_type
        self.ours = cls(groups, **options, norm_type=norm_type, **around)
        options = {k: v for k, v in options.items() if k != "compiled"}
        self.torch = oracle(cls)([{"params": self.theirs[:1]}, {"params": self.theirs[1:]}], **options)
        self.average = AveragedModel(
            torch.nn.ParameterList(self.theirs), multi_avg_fn=get_ema_multi_avg_fn(around.get("ema_decay") or 0.0)
        )

    def step_theirs(self) -> Tensor | None:
        most, norm = self.around.get("max_grad_norm"), None
        if most is not None:
            norm = clip_grad_norm_(self.theirs, most, self.norm_type)
        self.torch.step()
        self.average.update_parameters(torch.nn.ParameterList(self.theirs))
        return norm

    def step(self, missing: tuple[int, ...] = ()) -> None:
        set_gradients(self.params, self.theirs, missing=missing)
        kept = [None if p.grad is None else p.grad.clone() for p in self.params]
        self.ours.step()
        norm = self.step_theirs()
        if norm is not None:
            assert_same(self.ours.grad_norm, norm)  # type: ignore[arg-type]
        assert all(g is None or torch.equal(p.grad, g) for p, g in zip(self.params, kept, strict=True))

    def check(self) -> None:
        for p, q in zip(self.params, self.theirs, strict=True):
            assert_same(p, q)
            own = type(self.ours).rule.declaration.slots  # what torch has, too, and advances
            for name, value in {k: v for k, v in self.torch.state[q].items() if k in own}.items():
                assert_same(self.ours.state[p][name], torch.as_tensor(value))
        if "ema_decay" in self.around:
            for p, q in zip(self.params, self.average.module, strict=True):
                if p in self.ours.state:
                    assert_same(self.ours.state[p]["ema"], q)


@each
@both
def test_one_pass_equals_the_separate_passes(cls: Any, options: dict[str, Any], compiled: bool) -> None:
    run = Beside(cls, {**options, "compiled": compiled}, max_grad_norm=0.7, ema_decay=0.9)
    for _ in range(4):
        run.step()
    run.check()
    assert set(executions(run.ours)) == ({"multi_tensor"} if compiled else {"eager"})


@both
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("most", [0.0, 0.5, 1e9])
def test_each_norm_clips_as_torch_does(norm_type: float, most: float, compiled: bool) -> None:
    run = Beside(AdamW, {"compiled": compiled}, norm_type=norm_type, max_grad_norm=most)
    for missing in ((), (1,), (0, 1, 2), ()):
        run.step(missing)
    run.check()


def test_graphs_over_lists_clip_and_average() -> None:
    run = Beside(AdamW, {"compiled": "foreach"}, max_grad_norm=0.5, ema_decay=0.8)
    for _ in range(3):
        run.step()
    run.check()
    assert set(executions(run.ours)) == {"foreach"}


@both
def test_a_step_in_a_graph_of_the_user_does_all(compiled: bool) -> None:
    run = Beside(AdamW, {"compiled": compiled}, max_grad_norm=0.5, ema_decay=0.8, skip_nonfinite=True)
    weight, steps = run.params[0], 0

    @torch.compile
    def iteration(x: Tensor) -> None:
        nonlocal steps
        (weight * x).square().sum().backward()
        run.ours.step()
        run.ours.zero_grad()

    for scale in (1.0, 3.0, math.inf, 0.1):
        iteration(torch.full((), scale))
        if scale != math.inf:
            (run.theirs[0] * scale).square().sum().backward()
            run.step_theirs()
            run.torch.zero_grad()
    run.check()
    assert run.ours.skipped_steps == 1


# ---- kernels


def test_no_value_of_these_options_is_in_a_kernel() -> None:
    params = parameters()
    optimizer = AdamW(params, compiled=True, max_grad_norm=1.0, ema_decay=0.5)
    set_gradients(params)
    optimizer.step()
    before = cache_info()
    for most, decay in ((0.1, 0.9), (5.0, 0.99)):
        optimizer.max_grad_norm, optimizer.ema_decay = most, decay
        set_gradients(params)
        optimizer.step()
    other = AdamW(parameters(), compiled=True, max_grad_norm=9.0, ema_decay=0.1, skip_nonfinite=True)
    set_gradients(other.param_groups[0]["params"])
    other.step()
    assert (cache_info().misses, cache_info().kernels) == (before.misses, before.kernels)
    assert [row.launches for row in explain(optimizer)] == [1]


def test_an_optimizer_without_these_options_is_as_before() -> None:
    params = parameters()
    optimizer = AdamW(params, compiled=True)
    set_gradients(params)
    optimizer.step()
    assert optimizer.rule is AdamW.rule
    assert (optimizer.grad_norm, optimizer.skipped_steps, optimizer.ema_decay) == (None, 0, None)
    assert [row.kernel for row in explain(optimizer)] == ["AdamW(decoupled_weight_decay)[float64]"]


# ---- gradients that are not finite


@each_kind
@both
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_non_finite_gradient_changes_nothing(cls: Any, compiled: bool, value: float) -> None:
    params = parameters()
    optimizer = cls(params, **rich_options(cls), compiled=compiled, skip_nonfinite=True, ema_decay=0.5)
    schedule = StepLR(optimizer, 1, gamma=0.5)
    optimizer.attach(schedule)
    set_gradients(params)
    optimizer.step()
    before = copy.deepcopy((params, states(optimizer, params), optimizer.param_groups[0]["lr"]))
    versions = [p._version for p in params]
    set_gradients(params)
    params[-1].grad.view(-1)[-1] = value
    optimizer.step()
    after = (params, states(optimizer, params), optimizer.param_groups[0]["lr"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert [p._version for p in params] == versions
    assert optimizer.skipped_steps == 1
    set_gradients(params)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not torch.equal(params[0], before[0][0])


@both
def test_a_first_step_that_is_skipped_makes_no_state(compiled: bool) -> None:
    params = parameters()
    optimizer = Adam(params, compiled=compiled, skip_nonfinite=True)
    set_gradients(params)
    params[0].grad.fill_(math.nan)
    optimizer.step()
    assert (len(optimizer.state), optimizer.skipped_steps) == (0, 1)


@both
def test_a_non_finite_norm_can_be_an_error(compiled: bool) -> None:
    params = parameters()
    optimizer = Adam(params, compiled=compiled, max_grad_norm=1.0, error_if_nonfinite=True)
    set_gradients(params)
    optimizer.step()
    before = copy.deepcopy((params, states(optimizer, params)))
    params[1].grad.view(-1)[0] = math.inf
    with pytest.raises(RuntimeError, match=r"norm of order 2\.0 of the gradients is not finite"):
        optimizer.step()
    torch.testing.assert_close((params, states(optimizer, params)), before, rtol=0, atol=0)


@both
def test_without_a_word_of_it_a_non_finite_norm_is_torchs(compiled: bool) -> None:
    run = Beside(SGD, {"lr": 0.1, "compiled": compiled}, max_grad_norm=1.0)
    for value in (math.inf, math.nan):
        set_gradients(run.params, run.theirs)
        for params in (run.params, run.theirs):
            params[1].grad.view(-1)[0] = value
        run.ours.step()
        run.step_theirs()
        torch.testing.assert_close(run.params, run.theirs, equal_nan=True)


# ---- GradScaler


def scaled_steps(run: Beside, scaler: GradScaler, other: GradScaler, losses: list[float]) -> None:
    for scale in losses:
        set_gradients(run.params, run.theirs)
        for p, q in zip(run.params, run.theirs, strict=True):
            p.grad *= scaler.get_scale() * scale
            q.grad *= other.get_scale() * scale
        kept = [p.grad.clone() for p in run.params]
        scaler.step(run.ours)
        scaler.update()
        other.unscale_(run.torch)
        if all(q.grad.isfinite().all() for q in run.theirs):
            clip_grad_norm_(run.theirs, run.around["max_grad_norm"])
            other.step(run.torch)
            run.average.update_parameters(torch.nn.ParameterList(run.theirs))
        else:
            other.step(run.torch)
        other.update()
        assert scaler.get_scale() == other.get_scale()
        torch.testing.assert_close([p.grad for p in run.params], kept, rtol=0, atol=0, equal_nan=True)


@each_kind
@both
def test_a_grad_scaler_unscales_within_the_step(cls: Any, compiled: bool) -> None:
    run = Beside(cls, {**rich_options(cls), "compiled": compiled}, max_grad_norm=0.5, ema_decay=0.9)
    scaler, other = GradScaler("cpu", init_scale=1024.0), GradScaler("cpu", init_scale=1024.0)
    for made in (scaler, other):
        made.scale(torch.zeros(()))
    scaled_steps(run, scaler, other, [1.0, 2.0, math.inf, 1.0, 0.5])
    run.check()
    assert run.ours.skipped_steps == 1


@both
def test_an_unscaled_gradient_is_not_unscaled_again(compiled: bool) -> None:
    run = Beside(AdamW, {"compiled": compiled}, max_grad_norm=0.5)
    scaler = GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(()))
    set_gradients(run.params, run.theirs)
    for p in run.params:
        p.grad *= 64
    scaler.unscale_(run.ours)
    scaler.step(run.ours)
    run.step_theirs()
    run.check()


@both
def test_several_optimizers_have_one_scaler(compiled: bool) -> None:
    runs = [Beside(cls, {"compiled": compiled}, max_grad_norm=0.5, skip_nonfinite=True) for cls in (AdamW, SGD)]
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    for broken in (False, True, False):
        for i, run in enumerate(runs):
            set_gradients(run.params, run.theirs)
            for p in run.params:
                p.grad *= scaler.get_scale() * (math.inf if broken and i == 0 else 1.0)
            scaler.step(run.ours)
            if not (broken and i == 0):
                run.step_theirs()
        scaler.update()
    for run in runs:
        run.check()
    assert [run.ours.skipped_steps for run in runs] == [1, 0]
    assert scaler.get_scale() == 4.0


# ---- gradients that add up, and sparse ones


@both
def test_accumulated_gradients_are_clipped_once(compiled: bool) -> None:
    run = Beside(AdamW, {"compiled": compiled}, max_grad_norm=0.5)
    for _ in range(3):
        for params, optimizer in ((run.params, run.ours), (run.theirs, run.torch)):
            for k in range(3):
                sum((p * (k + 1)).square().sum() for p in params).backward()  # type: ignore[union-attr]
            optimizer.step() if optimizer is run.ours else run.step_theirs()
            optimizer.zero_grad()
    run.check()


SPARSE = [cls for cls in CLASSES if cls.accepts_sparse or not cls.accepts_dense]


@pytest.mark.parametrize("cls", SPARSE, ids=lambda cls: cls.__name__)
@both
def test_sparse_gradients_are_clipped_by_the_norm_of_their_rows(cls: Any, compiled: bool) -> None:
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 15).reshape(5, 3)) for _ in range(2))
    ours, theirs = cls([p], max_grad_norm=0.5, lr=0.1, compiled=compiled), oracle(cls)([q], lr=0.1)
    for rows in ([0, 2, 2], [4, 1, 4]):
        values = torch.randn(3, 3)
        p.grad = torch.sparse_coo_tensor(torch.tensor([rows]), values, p.shape)
        whole = p.grad.coalesce()
        norm = whole.values().norm()
        clipped = whole.values() * (0.5 / (norm + 1e-6)).clamp(max=1.0)
        q.grad = torch.sparse_coo_tensor(whole.indices(), clipped, q.shape)
        ours.step()
        theirs.step()
        assert_same(ours.grad_norm, norm)  # type: ignore[arg-type]
    assert_same(p, q)


@pytest.mark.parametrize("cls", [c for c in SPARSE if c.accepts_dense], ids=lambda cls: cls.__name__)
@both
@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("ignore:a parameter of shape .* is updated eagerly, because its gradient is sparse")
def test_an_average_moves_on_in_rows_without_gradient(cls: Any, compiled: bool) -> None:
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 15).reshape(5, 3)) for _ in range(2))
    sparse, dense = (cls([t], ema_decay=0.5, lr=0.1, compiled=compiled) for t in (p, q))
    for rows in ([0, 2, 2], [4, 1, 4], [0, 1, 2]):
        p.grad = torch.sparse_coo_tensor(torch.tensor([rows]), torch.randn(3, 3), p.shape)
        q.grad = p.grad.to_dense()
        sparse.step()
        dense.step()
    assert_same(sparse.state[p]["ema"], dense.state[q]["ema"])
    assert_same(p, q)


def test_sparse_adam_keeps_no_average() -> None:
    with pytest.raises(ValueError, match=r"SparseAdam: ema_decay must be None, got 0\.9"):
        SparseAdam(parameters(), ema_decay=0.9)


# ---- averages


@each_kind
@both
def test_the_decay_can_follow_the_step(cls: Any, compiled: bool) -> None:
    def decay(t: int) -> float:
        return min(0.9, (1 + t) / (10 + t))

    params = parameters()
    optimizer = cls(params, compiled=compiled, ema_decay=decay)
    expected: list[Tensor] = []
    for t in range(1, 5):
        set_gradients(params)
        optimizer.step()
        now = [p.detach().clone() for p in params]
        pairs = zip(expected, now, strict=True)
        expected = [e + (1 - decay(t)) * (n - e) for e, n in pairs] if expected else now
    for p, e in zip(params, expected, strict=True):
        assert_same(optimizer.state[p]["ema"], e)


@both
def test_averaged_swaps_the_averages_in_and_out(compiled: bool) -> None:
    params = parameters()
    optimizer = AdamW([*params, torch.nn.Parameter(torch.ones(2))], compiled=compiled, ema_decay=0.5)
    for _ in range(3):
        set_gradients(params)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    with pytest.raises(KeyError, match="left"), optimizer.averaged():  # noqa: PT012
        assert all(torch.equal(p, optimizer.state[p]["ema"]) for p in params)
        assert not torch.equal(params[0], before[0])
        with pytest.raises(RuntimeError, match="must not be called within averaged"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="must not be entered twice"), optimizer.averaged():
            pass
        raise KeyError("left by an exception")
    torch.testing.assert_close([*params], before, rtol=0, atol=0)
    optimizer.step()


def test_averages_need_a_decay() -> None:
    with pytest.raises(RuntimeError, match="built with ema_decay"), SGD(parameters()).averaged():
        pass


# ---- checkpoints and copies


@each_kind
@both
def test_checkpoints_keep_the_keys_of_torch(cls: Any, compiled: bool) -> None:
    run = Beside(cls, {"compiled": compiled}, max_grad_norm=0.5, ema_decay=0.9)
    for _ in range(2):
        run.step()
    saved, theirs = run.ours.state_dict(), run.torch.state_dict()
    assert [g.keys() for g in saved["param_groups"]] == [g.keys() for g in theirs["param_groups"]]
    own = {*cls.rule.declaration.slots}
    assert all(saved["state"][i].keys() & own == s.keys() for i, s in theirs["state"].items())
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    run.torch.load_state_dict(torch.load(buffer, weights_only=True))
    run.ours.load_state_dict(saved)
    run.step()
    run.check()


@each_kind
@both
def test_an_average_begins_with_a_checkpoint_that_has_none(cls: Any, compiled: bool) -> None:
    run = Beside(cls, {"compiled": compiled}, ema_decay=0.75)
    set_gradients(run.theirs)
    run.torch.step()
    run.ours.load_state_dict(run.torch.state_dict())
    with torch.no_grad():
        for p, q in zip(run.params, run.theirs, strict=True):
            p.copy_(q)
    if len(run.torch.state[run.theirs[0]]) == 0:
        pytest.skip(f"{cls.__name__} has no state, so its first step is the first")
    begin = [p.detach().clone() for p in run.params]
    run.step()
    for p, b in zip(run.params, begin, strict=True):
        assert_same(run.ours.state[p]["ema"], b + 0.25 * (p.detach() - b))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: torch.load(_saved(o), weights_only=False)])
def test_a_copy_has_the_options(duplicate: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = AdamW(params, compiled=True, max_grad_norm=0.5, ema_decay=0.9, skip_nonfinite=True)
    set_gradients(params)
    optimizer.step()
    other = duplicate(optimizer)
    copied = other.param_groups[0]["params"]
    assert (other.max_grad_norm, other.ema_decay) == (0.5, 0.9)
    set_gradients(params, copied)
    optimizer.step()
    other.step()
    torch.testing.assert_close([*copied], [*params], rtol=0, atol=0)
    copied[0].grad.fill_(math.nan)
    other.step()
    assert (optimizer.skipped_steps, other.skipped_steps) == (0, 1)


def _saved(optimizer: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return buffer


# ---- errors

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be at least 0 or None, got -1.0"),
    ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm must be at least 0 or None, got nan"),
    ({"max_grad_norm": "1"}, ValueError, "max_grad_norm must be at least 0 or None, got '1'"),
    ({"max_grad_norm": 1.0, "norm_type": 1.0}, ValueError, "norm_type must be 2 or inf, got 1.0"),
    ({"error_if_nonfinite": True}, ValueError, "error_if_nonfinite=True needs max_grad_norm"),
    ({"max_grad_norm": 1.0, "error_if_nonfinite": True, "skip_nonfinite": True}, ValueError, "exclude each other"),
    ({"ema_decay": 1.5}, ValueError, "ema_decay must be at least 0 and at most 1, .* got 1.5"),
    ({"state_dtype": torch.float16}, ValueError, "state_dtype must be None or one of .* got torch.float16"),
    ({"stochastic_rounding": 0.5}, TypeError, "stochastic_rounding must be a bool or an int, got 0.5"),
    ({"stochastic_rounding": 3, "master_weights": True}, ValueError, "takes the place of master_weights"),
    ({"ema_decay": 0.9, "differentiable": True}, RuntimeError, "differentiable=True does not go with"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG, ids=[named(o) for o, _, _ in WRONG])
def test_errors_name_the_argument(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        AdamW(parameters(), **options)


def test_what_was_not_asked_for_cannot_be_assigned() -> None:
    optimizer, plain = AdamW(parameters(), ema_decay=0.9), AdamW(parameters())
    with_masters = AdamW(parameters(), compiled=True, master_weights=True)  # whose quick steps do not clip
    wrong: list[tuple[AdamW, str, Any]] = [(plain, "max_grad_norm", 1.0), (optimizer, "ema_decay", None)]
    for changed, name, value in [*wrong, (with_masters, "max_grad_norm", 1.0), (optimizer, "max_grad_norm", 1.0)]:
        with pytest.raises(ValueError, match=f"{name} must stay"):
            setattr(changed, name, value)
    with pytest.raises(ValueError, match="ema_decay must be at least 0"):
        optimizer.ema_decay = 2.0
    assert optimizer.ema_decay == 0.9
