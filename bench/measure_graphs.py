"""What `graphs/README.md` holds beside the kernels: the same rules on lists of tensors, through torch.compile.

    python bench/measure_graphs.py graphs/measured.json [NAME ...]

No GPU is needed: Dynamo and AOTAutograd run on the CPU, and Inductor lowers their graph for a GPU that does not exist.
Seconds are those of a processor, which a busy machine changes little, up to the text of Triton's kernels; machine code
takes more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from compiled_optim._engine.executions import traced_lists
from compiled_optim._engine.kernels.trace import Signature
from compiled_optim._engine.torch_private import absent_gpu
from compiled_optim.graphs import signatures

COUNTS = (4, 40)


class Lowered(Exception):
    """There is nothing to run it on."""


def foreach(signature: Signature, tensors: int) -> list[float]:
    """Launches of a step of so many tensors, and the seconds from its first call to the text of its kernels."""
    names, width = signature.scalars, signature.scalar_dtype
    on, buffers = tuple(signature.switches), signature.buffers
    part = traced_lists.Part(tuple(range(tensors)), (0,) * tensors, width, on, buffers, names, None)
    launches = []

    def lower(module: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> None:
        with V.fake_mode:
            strided = [(t.shape, t.stride(), t.dtype) for t in inputs]
            there = [torch.empty_strided(*shape, dtype=dtype, device="cuda") for *shape, dtype in strided]
        FakeTensorProp(module, V.fake_mode).propagate_dont_convert_inputs(*there)
        lowering = GraphLowering(module, example_inputs=there, is_inference=True)
        with absent_gpu.pretend(90), V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*there)
            launches.append(lowering.codegen()[0].value.count(".run("))
        raise Lowered

    def column() -> list[torch.Tensor]:
        return [torch.zeros((256, 100 + i) if i % 2 else (100 + i,)) for i in range(tensors)]

    stock = torch.compile
    try:
        torch.compile = lambda f, *, options, **how: stock(
            f, backend=lambda *graph: compile_fx(*graph, inner_compile=lower, config_patches=options), **how
        )
        step = traced_lists._compile(signature.rule, [part])
    finally:
        torch.compile = stock
    columns = (column(), column(), {name: column() for name in buffers}, [])
    begun = process_time()
    try:
        with torch.no_grad():
            step([columns], torch.zeros(1, len(names), dtype=width), [])
    except Exception as error:
        if not launches:
            raise error
    return [launches[0], round(process_time() - begun, 1)]


def main(file: Path, names: list[str]) -> None:
    measured = {"error": {}, "foreach": {}, **json.loads(file.read_text()), "tensors": COUNTS}
    known = dict(signatures())
    foreach(known["SGD"], 1)  # imports
    for name in names or [name for name in known if not name.endswith("-all-switches")]:
        measured["foreach"][name] = {n: foreach(known[name], n) for n in COUNTS}
        print(name, measured["foreach"][name], flush=True)
        file.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
