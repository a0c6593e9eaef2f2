"""One of two processes that train together, with each feature and way. test_distributed.py runs it.

python worker.py RANK DIRECTORY    writes DIRECTORY/RANK.json: {feature: {way: [problem, executions]}}
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from training import WAYS, Way, assert_same, digits, network

import compiled_optim
from compiled_optim import explain

LR, CLIP = 0.01, 0.1
KERNELS = "Processes of one machine: each kernel is compiled once"
Build = Callable[..., Any]  # of an optimizer, from parameters and options
FEATURES: dict[str, tuple[Callable[..., Any], float]] = {}


def feature(name: str, tolerance: float = 1e-12) -> Any:
    """A function of a mesh and a Build that returns the trained model, and the optimizers of this process."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        FEATURES[name] = function, tolerance
        return function

    return keep


def train(model: Any, optimizer: Any, *, steps: int = 6, clip: Any = None, start: int = 0) -> None:
    """Each process has a batch of its own, unless both compute one model together."""
    images, labels = digits(400, next(model.parameters()).dtype).tensors
    rank = 0 if getattr(model, "is_tensor_parallel", False) else dist.get_rank()
    for step in range(start, start + steps):
        rows = slice(16 * (2 * step + rank), 16 * (2 * step + rank + 1))
        optimizer.zero_grad()
        cross_entropy(model(images[rows]), labels[rows]).backward()
        if clip is not None:
            clip(model)
        optimizer.step()


def clipped(model: Any) -> None:
    clip_grad_norm_(model.parameters(), CLIP)


def net() -> Any:
    return network(dtype=torch.float64)


@feature("DDP: gradients that are views of buckets, a static graph, clipping")
def ddp(mesh: DeviceMesh, build: Build) -> Any:
    model = DistributedDataParallel(net(), gradient_as_bucket_view=True, static_graph=True)
    optimizer = build(model.parameters(), lr=LR)
    train(model, optimizer, clip=clipped)
    return model, [optimizer]


@feature("DDP: `_register_fused_optim`, after `import compiled_optim.integrations.ddp`")
def overlapped(mesh: DeviceMesh, build: Build) -> Any:
    from compiled_optim.integrations import ddp

    model, stepped = DistributedDataParallel(net()), []
    kind, options = build.overlapped(stepped)
    if kind is not torch.optim.AdamW:
        ddp.register(kind)
    model._register_fused_optim(kind, lr=LR, **options)
    train(model, torch.optim.SGD(model.parameters(), lr=0.0))  # which only resets the gradients
    return model, stepped


@feature("torch.distributed.optim: `_apply_optimizer_in_backward`, in each process")
def in_backward(mesh: DeviceMesh, build: Build) -> Any:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model, stepped = net(), []
    kind, options = build.overlapped(stepped)
    _apply_optimizer_in_backward(kind, model.parameters(), {"lr": LR, **options})
    train(model, torch.optim.SGD(net().parameters(), lr=0.0))
    return model, stepped


@feature("DDP: PostLocalSGD")
def local_sgd(mesh: DeviceMesh, build: Build) -> Any:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    model = DistributedDataParallel(net())
    optimizer = build(model.parameters(), lr=LR)
    train(model, PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(period=2, warmup_steps=2)))
    return model, [optimizer]


@feature("DDP: uneven inputs, with `Join`")
def joined(mesh: DeviceMesh, build: Build) -> Any:
    model = DistributedDataParallel(net())
    optimizer = build(model.parameters(), lr=LR)
    with Join([model]):
        train(model, optimizer, steps=4 + dist.get_rank())
    for p in model.parameters():  # of the last process to join
        dist.broadcast(p.data, 1)
    return model, [optimizer] * dist.get_rank()


@feature("ZeRO: ZeroRedundancyOptimizer over DDP, and `explain` of it")
def zero(mesh: DeviceMesh, build: Build) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(net())
    kind, options = build.overlapped([])
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, lr=LR, **options)
    train(model, optimizer, clip=clipped)
    optimizer.consolidate_state_dict()
    return model, [optimizer]


def fsdp1(mesh: DeviceMesh, build: Build, **options: Any) -> Any:
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), **options)
    optimizer = build(model.parameters(), lr=LR)
    train(model, optimizer, clip=lambda model: model.clip_grad_norm_(CLIP))
    with FullyShardedDataParallel.summon_full_params(model):
        whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    return whole, [optimizer]


@feature("FSDP1: flat parameters, clipping", 1e-6)
def flat(mesh: DeviceMesh, build: Build) -> Any:
    return fsdp1(mesh, build)


@feature("FSDP1: original parameters, clipping", 1e-6)
def original(mesh: DeviceMesh, build: Build) -> Any:
    return fsdp1(mesh, build, use_orig_params=True, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)


def sharded(mesh: DeviceMesh, **options: Any) -> Any:
    model = net()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, **options)
    return model


@feature("FSDP2: `fully_shard`, clipping")
def fsdp2(mesh: DeviceMesh, build: Build) -> Any:
    model = sharded(mesh)
    optimizer = build(model.parameters(), lr=LR)
    train(model, optimizer, clip=clipped)
    return model, [optimizer]


@feature("FSDP2: clipping within the step, `max_grad_norm`")
def clipped_in_step(mesh: DeviceMesh, build: Build) -> Any:
    model = sharded(mesh)
    in_step = build.way is not None
    optimizer = build(model.parameters(), lr=LR, **({"max_grad_norm": CLIP} if in_step else {}))
    train(model, optimizer, clip=None if in_step else clipped)
    return model, [optimizer]


@feature("FSDP2: MixedPrecisionPolicy(bfloat16)", 1e-5)
def low_precision(mesh: DeviceMesh, build: Build) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float64)
    model = sharded(mesh, mp_policy=policy)
    optimizer = build(model.parameters(), lr=LR)
    train(model, optimizer)
    return model, [optimizer]


def parallel(mesh: DeviceMesh) -> Any:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model: Any = parallelize_module(net(), mesh, plan)
    model.is_tensor_parallel = True
    return model


@feature("Tensor parallel: columns and rows, clipping")
def tensor_parallel(mesh: DeviceMesh, build: Build) -> Any:
    model = parallel(mesh)
    optimizer = build(model.parameters(), lr=LR)
    train(model, optimizer, clip=clipped)
    return model, [optimizer]


@feature("FSDP2: of a model that is tensor parallel, clipping")
def two_dimensions(mesh: DeviceMesh, build: Build) -> Any:
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shards", "columns"))
    model = parallel(both["columns"])
    fully_shard(model, mesh=both["shards"])
    optimizer = build(model.parameters(), lr=LR)
    train(model, optimizer, clip=clipped)
    return model, [optimizer]


@feature("Distributed checkpoint: saved by two processes")
def checkpoint(mesh: DeviceMesh, build: Build) -> Any:
    """`test_a_checkpoint_goes_on_in_one_process` goes on from there."""
    model = sharded(mesh)
    optimizer = build(model.parameters(), lr=LR)
    train(model, optimizer)
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=build.directory / build.name)
    return model, [optimizer]


class Builder:
    """torch.optim's AdamW, or ours in a way. Checkpoints go to the directory."""

    def __init__(self, way: Way | None, directory: Path) -> None:
        self.way, self.name, self.directory = way, way.name if way else "torch", directory

    def __call__(self, params: Any, **options: Any) -> Any:
        return (self.way.of("AdamW") if self.way else torch.optim.AdamW)(params, **options)

    def overlapped(self, stepped: list[Any]) -> Any:
        """A class that appends what is made of it to a list, and its options."""
        if self.way is None:
            return torch.optim.AdamW, {}

        class AdamW(compiled_optim.AdamW):
            def __init__(self, params: Any, **options: Any) -> None:
                super().__init__(params, **options)
                stepped.append(self)

        return AdamW, self.way.options()


def whole(model: Any) -> dict[str, Any]:
    named = model if isinstance(model, dict) else dict(model.named_parameters())
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in named.items()}


def attempt(name: str, mesh: DeviceMesh, way: Way, directory: Path, stock: Any) -> list[str]:
    try:
        train_it, tolerance = FEATURES[name]
        model, optimizers = train_it(mesh, Builder(way, directory))
        assert_same(whole(model), stock, tolerance)
        for optimizer in optimizers:
            rows = list(explain(optimizer))
            if not all(row.reason == "no step was taken yet" for row in rows):
                way.check(optimizer)
    except Exception:
        return [traceback.format_exc(), ""]
    return ["", " and ".join(sorted(way.seen))]


def shared_kernels() -> dict[str, list[str]]:
    """Both processes want the same two kernels at the same time, which nobody has compiled yet."""
    for kind in (compiled_optim.AdamW, compiled_optim.SGD):
        dist.barrier()
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = kind([p], lr=0.1, compiled=True)
        optimizer.step()
        (row,) = explain(optimizer)
        assert row.origin in ("compiled", "disk"), row
    misses = [None, None]
    dist.all_gather_object(misses, compiled_optim.cache_info().misses)
    return {"compiled": ["" if sum(misses) == 2 else f"each has compiled {misses}", "multi_tensor"]}


def main(rank: int, directory: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    outcomes: dict[str, Any] = {KERNELS: shared_kernels()}
    for name, (run, _) in FEATURES.items():
        stock = whole(run(mesh, Builder(None, directory))[0])
        outcomes[name] = {way: attempt(name, mesh, Way(way), directory, stock) for way in WAYS}
    (directory / f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", compiled_optim.CompileFallbackWarning)
    main(int(sys.argv[1]), Path(sys.argv[2]))
