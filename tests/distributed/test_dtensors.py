"""DTensor parameters: every execution updates the shards of the process, as torch.optim updates the whole."""

from __future__ import annotations

import copy
import math
import re
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("torch.distributed.tensor", reason="this torch was built without torch.distributed")

from beside_torch import assert_same
from cases import ELEMENTWISE, oracle, tolerance
from sharded import STEPS, Pair, parameter, whole
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel as StockAverage

import compiled_optim
from compiled_optim import SGD, AdamW, Optimizer, explain, lr_scheduler
from compiled_optim._engine.executions.norms import total_norm
from compiled_optim.declare import buffer, number
from compiled_optim.swa_utils import AveragedModel, get_ema_avg_fn

WAYS: dict[str, dict[str, Any]] = {"eager": {}, "loop": {"foreach": False}, "compiled": {"compiled": True}}
ways = pytest.mark.parametrize("way", WAYS)
DENSE = [cls for cls in ELEMENTWISE if cls.accepts_dense]


class Run:
    """Two sharded parameters, a replicated and a plain one, under ``ours``; copies that are plain under ``stock``."""

    def __init__(self, mesh: Any, cls: Any, **options: Any) -> None:
        self.mesh = mesh
        values = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 4), (5,), (2, 3), (4, 1))]
        placements = (Shard(0), Shard(0), Replicate())
        sharded = [parameter(v, mesh, place) for v, place in zip(values, placements, strict=False)]
        self.params = [*sharded, torch.nn.Parameter(values[3].clone())]
        self.plain = [torch.nn.Parameter(v.clone()) for v in values]
        shared = {k: v for k, v in options.items() if k != "compiled"}
        self.ours, self.stock = cls(self.params, **options), oracle(cls)(self.plain, **shared)

    def give(self, *missing: int) -> None:
        for i, (p, q) in enumerate(zip(self.params, self.plain, strict=True)):
            q.grad = None if i in missing else torch.randn_like(q)
            sharded = isinstance(p, DTensor) and q.grad is not None
            p.grad = parameter(q.grad, self.mesh, *p.placements).detach() if sharded else copy.deepcopy(q.grad)

    def step(self, *missing: int) -> None:
        self.give(*missing)
        self.ours.step()
        self.stock.step()

    def compare(self, rtol: float = 1e-12) -> None:
        for p, q in zip(self.params, self.plain, strict=True):
            assert_same(whole(p), q, rtol)
            expected = {k: v for k, v in self.stock.state.get(q, {}).items() if v is not None}
            state = self.ours.state.get(p, {})
            assert set(state) == set(expected)
            for name, value in expected.items():
                assert isinstance(state[name], DTensor) == (value.dim() > 0 and isinstance(p, DTensor))
                assert_same(whole(state[name]), value, rtol, name)

    def untouched_by(self, error: str) -> None:
        before = copy.deepcopy([[whole(p) for p in self.params], [dict(s) for s in self.ours.state.values()]])
        with pytest.raises(RuntimeError, match=error):
            self.ours.step()
        after = [[whole(p) for p in self.params], [dict(s) for s in self.ours.state.values()]]
        assert repr(after) == repr(before)


@ways
@pytest.mark.parametrize("cls", DENSE, ids=lambda cls: cls.__name__)
def test_every_algorithm(mesh: Any, cls: Any, way: str) -> None:
    run = Run(mesh, cls, **WAYS[way])
    for missing in ((1,), (), (0, 3)):
        run.step(*missing)
    run.compare(tolerance(cls))
    assert {row.execution: row.tensors for row in explain(run.ours)} == (
        {"multi_tensor": 4} if way == "compiled" else {"eager": 4}
    )


def test_by_torch_compile(mesh: Any) -> None:
    run = Run(mesh, AdamW, compiled="foreach")
    for _ in range(STEPS):
        run.step()
    run.compare()
    assert {row.execution for row in explain(run.ours)} == {"foreach"}


@ways
def test_masters_and_moments_are_sharded_as_their_parameter(mesh: Any, way: str) -> None:
    around = {"master_weights": True, "state_dtype": torch.bfloat16}
    run = Run(mesh, AdamW)
    with torch.no_grad():
        run.params = [torch.nn.Parameter(p.bfloat16()) for p in run.params]
        run.plain = [torch.nn.Parameter(p.bfloat16()) for p in run.plain]
    run.ours, run.stock = AdamW(run.params, **WAYS[way], **around), AdamW(run.plain, **WAYS[way], **around)
    for _ in range(2):
        run.step()
    run.ours.load_state_dict(copy.deepcopy(run.ours.state_dict()))
    run.step(1)
    run.compare(0.0)
    for p in run.params:
        dtypes = {name: value.dtype for name, value in run.ours.state[p].items()}
        assert dtypes == {
            "step": torch.float32,
            "master": torch.float32,
            "exp_avg": torch.bfloat16,
            "exp_avg_sq": torch.bfloat16,
        }


@ways
def test_tensors_that_are_replaced(mesh: Any, way: str) -> None:
    """As FSDP replaces the tensors of a shard, frameworks the listed parameters, and checkpoints the state."""
    run = Run(mesh, AdamW, **WAYS[way])
    run.step(0)
    run.params[0]._local_tensor = run.params[0]._local_tensor.clone()
    run.step(2)
    run.params[1].data = run.params[1].data.clone()
    run.step()
    old, listed = run.params[2], run.ours.param_groups[0]["params"]
    run.params[2] = listed[2] = torch.nn.Parameter(whole(old).clone())
    run.ours.state[listed[2]] = {name: whole(value).clone() for name, value in run.ours.state.pop(old).items()}
    run.step()
    old = run.params[3]
    run.params[3] = listed[3] = parameter(old, mesh, Shard(1))
    moments = run.ours.state.pop(old)
    run.ours.state[listed[3]] = {
        name: parameter(value, mesh, Shard(1)).detach() if value.dim() else value for name, value in moments.items()
    }
    run.step()
    run.ours.load_state_dict(copy.deepcopy(run.ours.state_dict()))
    run.step()
    run.compare()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_norm_of_gradients(mesh: Any, norm_type: float, compiled: bool) -> None:
    run = Run(mesh, AdamW)
    run.give()
    run.params[0].grad = DTensor.from_local(whole(run.params[0].grad), mesh, [Partial()])
    norm = total_norm([p.grad for p in run.params], norm_type, compiled=compiled)
    whole_norm = get_total_norm([q.grad for q in run.plain if q.grad is not None], norm_type).item()
    assert norm == pytest.approx(whole_norm, rel=1e-14)
    assert run.params[0].grad.placements == (Partial(),)


@ways
def test_gradients_of_another_layout(mesh: Any, way: str) -> None:
    """A gradient that strides otherwise than its parameter, or has another dtype, is as good."""
    run = Run(mesh, AdamW, **WAYS[way])
    for _ in range(STEPS):
        run.give()
        grad = whole(run.params[0].grad).t().contiguous().t()
        run.params[0].grad = DTensor.from_local(grad, mesh, [Partial()])
        run.ours.step()
        run.stock.step()
        assert run.params[0].grad.placements == (Partial(),)
    run.compare()


@ways
def test_a_backward_pass_knows_that_its_parameters_have_changed(mesh: Any, way: str) -> None:
    run = Run(mesh, AdamW, **WAYS[way])
    run.step()
    loss = run.params[0].square().sum().full_tensor()
    run.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@ways
def test_checkpoints_of_an_optimizer_that_has_not_stepped(mesh: Any, way: str) -> None:
    """torch makes its state by a step with an lr of 0, and copies what was saved in it."""
    for saver, loader in (("ours", "stock"), ("stock", "ours"), ("ours", "ours")):
        builds: Any = {
            "ours": lambda params: AdamW(params, lr=torch.tensor(0.1, dtype=torch.float64), **WAYS[way]),
            "stock": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.1, dtype=torch.float64)),
        }
        first, second = (Pair(mesh, builds[name], builds["stock"]) for name in (saver, loader))
        first.step(range(STEPS))
        second.model.load_state_dict(first.model.state_dict())
        second.plain, second.optimizers = first.plain, (second.optimizers[0], first.optimizers[1])
        saved = get_optimizer_state_dict(first.model, first.optimizers[0])
        set_optimizer_state_dict(second.model, second.optimizers[0], saved)
        second.compare()
        second.step([7])
        second.compare()


@ways
def test_schedules_and_scaled_gradients(mesh: Any, way: str) -> None:
    run = Run(mesh, AdamW, lr=0.1, **WAYS[way])
    schedules = [
        lr_scheduler.StepLR(run.ours, step_size=1, gamma=0.5),
        torch.optim.lr_scheduler.StepLR(run.stock, step_size=1, gamma=0.5),
    ]
    for step in range(STEPS):
        run.give()
        run.ours.grad_scale = torch.tensor(4.0, dtype=torch.float64)
        run.ours.found_inf = torch.tensor(float(step == 1))
        for p in run.params:
            p.grad.mul_(4)
        run.ours.step()
        if step != 1:
            run.stock.step()
        for schedule in schedules:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                schedule.step()
    run.compare()


@ways
def test_models_sharded_in_two_dimensions(mesh: Any, way: str) -> None:
    """By tensor and by data; and the tensors of their parameters are replaced, as loading a checkpoint does it."""
    both = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))

    def shard(model: Any, mesh: Any) -> None:
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])

    pair = Pair(both, lambda params: AdamW(params, **WAYS[way]), torch.optim.AdamW, shard)
    assert len({p.placements for p in pair.model.parameters()}) > 1
    for step in range(STEPS):
        pair.step([step])
        values = {name: value.clone() for name, value in pair.model.state_dict().items()}
        pair.model.load_state_dict(values, assign=True)
        listed = pair.optimizers[0].param_groups[0]["params"]
        for i, (old, new) in enumerate(zip(list(listed), pair.model.parameters(), strict=True)):
            if new is not old:
                listed[i] = new
                pair.optimizers[0].state[new] = pair.optimizers[0].state.pop(old)
    pair.compare()


@ways
@pytest.mark.usefixtures("lenient")  # what is listed on the same shard twice may be updated eagerly
def test_shards_that_share_memory_are_updated_one_after_the_other(mesh: Any, way: str) -> None:
    memory = torch.ones(4, dtype=torch.float64)
    params = [torch.nn.Parameter(DTensor.from_local(memory, mesh, [Shard(0)])) for _ in range(2)]
    for p in params:
        p.grad = DTensor.from_local(torch.ones(4, dtype=torch.float64), mesh, [Shard(0)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", compiled_optim.CompileFallbackWarning)
        SGD(params, lr=0.25, **WAYS[way]).step()
    assert memory.tolist() == [0.5] * 4


class Centered(Optimizer):
    """Its rule takes a mean."""

    lr: float = number(default=0.1, low=0)
    average = buffer()
    elementwise = False

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        s.average = g - g.mean()
        return p - s.average * k.lr


@pytest.mark.parametrize("compiled", [False, True, "foreach"])
def test_what_needs_a_whole_tensor_is_refused_by_name(mesh: Any, compiled: Any) -> None:
    p = parameter(torch.ones(3), mesh, Shard(0))
    p.grad = parameter(torch.ones(3), mesh, Shard(0)).detach()
    optimizer = Centered([p], compiled=compiled)
    with pytest.raises(RuntimeError, match=r"Centered does not support DTensor parameters.*not elementwise"):
        optimizer.step()
    assert not optimizer.state
    assert whole(p).tolist() == [1, 1, 1]
    lbfgs = compiled_optim.LBFGS([p], compiled=bool(compiled))
    with pytest.raises(RuntimeError, match="LBFGS does not support DTensor parameters"):
        lbfgs.step(lambda: p.sum())


@ways
def test_gradients_and_state_that_do_not_fit_are_refused_by_name(mesh: Any, way: str) -> None:
    for stepped in (False, True):
        run = Run(mesh, AdamW, **WAYS[way])
        if stepped:
            run.step()
        run.give()
        good, p = run.params[0].grad, run.params[0]
        p.grad = whole(good)
        run.untouched_by(r"gradient of a DTensor of shape \(3, 4\) must be a DTensor on DeviceMesh.*, got a Tensor")
        p.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 4, dtype=torch.float64), (3, 4), check_invariants=True)
        run.untouched_by(
            "AdamW does not support sparse gradients|must be a DTensor on DeviceMesh.*, got a sparse Tensor"
        )
        p.grad = good
        if stepped:
            right = run.ours.state[p]["exp_avg"]
            for wrong in (whole(right), right.redistribute(placements=[Replicate()])):
                run.ours.state[p]["exp_avg"] = wrong
                run.untouched_by(r"state 'exp_avg' of a parameter of shape \(3, 4\) must be a DTensor.*Shard\(dim=0\)")
            run.ours.state[p]["exp_avg"] = right
        run.ours.step()  # all is as it was
        run.stock.step()
        run.compare()


def test_other_refusals(mesh: Any) -> None:
    run = Run(mesh, SGD, lr=0.1, differentiable=True)
    run.give()
    run.untouched_by("SGD does not support DTensor parameters with differentiable=True")
    pending = torch.nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    pending.grad = parameter(torch.ones(3), mesh, Replicate()).detach()
    with pytest.raises(
        RuntimeError, match=re.escape("values are pending sums, got a DTensor with placements (Partial")
    ):
        SGD([pending], lr=0.1).step()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_in_a_compiled_loop_the_step_is_outside_of_the_graph(mesh: Any, compiled: bool) -> None:
    run = Run(mesh, AdamW, compiled=compiled)

    def train(optimizer: Any, params: list[Any], factor: Any) -> None:
        optimizer.zero_grad()
        for p in params[:2]:
            (p * factor).square().sum().backward()
        optimizer.step()

    loop = torch.compile(train, backend="aot_eager", dynamic=False)
    for step in range(STEPS):
        loop(run.ours, run.params, 2.0)
        train(run.stock, run.plain, 2.0)
        assert len(run.ours.state) == 2, step
    run.compare()
    assert {row.execution for row in explain(run.ours)} == {"multi_tensor" if compiled else "eager"}


def test_averages(mesh: Any) -> None:
    model, plain = (torch.nn.Linear(3, 2).double() for _ in range(2))
    for name, p in plain.named_parameters():
        model.register_parameter(name, parameter(p, mesh, Shard(0)))
    ours, stock = (
        AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), compiled=True),
        StockAverage(plain, avg_fn=get_ema_avg_fn(0.9)),
    )
    for _ in range(STEPS):
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            with torch.no_grad():
                q.normal_()
                p.copy_(parameter(q, mesh, Shard(0)))
        ours.update_parameters(model)
        stock.update_parameters(plain)
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        assert_same(whole(p), q)
