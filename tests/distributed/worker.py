"""One of two processes that train together. Run by test_two_processes.py with its rank and a directory."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import STEPS, Pair, parameter, whole
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import compiled_optim
from compiled_optim import explain
from compiled_optim._engine.executions.norms import total_norm

WAYS: dict[str, dict[str, Any]] = {"eager": {}, "loop": {"foreach": False}, "compiled": {"compiled": True}}


def fully_sharded(mesh: DeviceMesh, directory: Path) -> None:
    for name, options in WAYS.items():
        pair = Pair(
            mesh,
            lambda params, options=options: compiled_optim.AdamW(params, lr=0.1, **options),
            lambda params: torch.optim.AdamW(params, lr=0.1),
        )
        pair.step(range(STEPS), clip=0.01)
        pair.compare()
        (row,) = explain(pair.optimizers[0])
        assert row.execution == ("multi_tensor" if name == "compiled" else "eager"), row
        save(pair, directory / name)
    empty = [p.to_local().numel() == 0 for p in pair.model.parameters()]
    assert any(empty) == (dist.get_rank() == 1), "the shards of the second process were to be empty"


def of_torch(mesh: DeviceMesh, directory: Path) -> None:
    pair = Pair(mesh, *[lambda params: torch.optim.AdamW(params, lr=0.1)] * 2)
    pair.step(range(STEPS), clip=0.01)
    save(pair, directory / "torch")


def save(pair: Pair, directory: Path) -> None:
    model, optimizer = get_state_dict(pair.model, pair.optimizers[0])
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=directory)


def gradients_in_other_places(mesh: DeviceMesh) -> None:
    """Pending sums, and shards of another dimension or none, belong to parameters that are laid out otherwise."""
    places = (Shard(0), Shard(1), Replicate(), Partial())
    for options in WAYS.values():
        torch.manual_seed(0)
        values = [torch.randn(3, 5, dtype=torch.float64) for _ in range(12)]
        sharded = [parameter(v, mesh, p) for v, p in zip(values, places[:3] * 4, strict=True)]
        plain = [torch.nn.Parameter(v.clone()) for v in [*values, values[0]]]
        sharded.append(torch.nn.Parameter(values[0].clone()))  # and one that is none
        ours = compiled_optim.AdamW(sharded, lr=0.1, **options)
        stock = torch.optim.AdamW(plain, lr=0.1)
        for step in range(STEPS):
            for i, (p, q) in enumerate(zip(sharded, plain, strict=True)):
                q.grad = torch.randn_like(q)
                if not isinstance(p, DTensor):
                    p.grad = q.grad.clone()
                elif isinstance(place := places[(i + i // 3 + step) % 4], Partial):
                    part = q.grad * (0.25 if dist.get_rank() else 0.75)
                    p.grad = DTensor.from_local(part, mesh, [place])
                else:
                    p.grad = parameter(q.grad, mesh, place).detach()
                    if isinstance(place, Shard) and step:  # under way while the step begins
                        p.grad = p.grad.redistribute(placements=[Replicate()], async_op=True)
            given = [(p.grad, getattr(p.grad, "placements", None)) for p in sharded]
            if step:
                plain[0].grad = sharded[0].grad = None
            ours.step()
            stock.step()
            for p, (grad, placements) in zip(sharded[1:], given[1:], strict=True):
                assert p.grad is grad
                assert getattr(p.grad, "placements", None) == placements
        for p, q in zip(sharded, plain, strict=True):
            torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-12, atol=1e-14)
            assert getattr(ours.state[p]["exp_avg"], "placements", None) == getattr(p, "placements", None)


def norms(mesh: DeviceMesh) -> None:
    """Of shards that differ in number, replicas, pending sums and a plain tensor; the same on both processes."""
    torch.manual_seed(0)
    values = [torch.randn(3, 5, dtype=torch.float64) for _ in range(5)]
    part = values[4] * (0.25 if dist.get_rank() else 0.75)
    grads = [
        distribute_tensor(v, mesh, [place]) for v, place in zip(values, (Shard(0), Shard(1), Replicate()), strict=False)
    ]
    grads += [values[3], DTensor.from_local(part, mesh, [Partial()])]
    for norm_type in (2.0, math.inf):
        expected = torch.linalg.vector_norm(torch.stack(values), norm_type).item()
        for compiled in (True, False):
            norm = total_norm(grads, norm_type, compiled=compiled)
            assert math.isclose(norm, expected, rel_tol=1e-14), (norm, expected)
    if dist.get_rank():
        grads[0].to_local()[0, 0] = math.nan  # elsewhere only
    assert all(math.isnan(total_norm(grads, p, compiled=c)) for p in (2.0, math.inf) for c in (True, False))


def main(rank: int, directory: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    fully_sharded(mesh, directory)
    of_torch(mesh, directory)
    gradients_in_other_places(mesh)
    norms(mesh)
    dist.destroy_process_group()
    print("done", flush=True)
    os._exit(0)  # gloo's threads, which this torch does not always join, would abort a third of the exits


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
