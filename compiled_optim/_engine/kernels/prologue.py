"""The scalars of a step as an FX graph over vectors with an element per tensor, for counts that lie on a device."""

from __future__ import annotations

from typing import Any

import torch

from compiled_optim._engine.kernels.trace import Signature, brief, write
from compiled_optim._engine.rule import evaluate
from compiled_optim._engine.torch_private import inductor
from compiled_optim._engine.torch_private.inductor import FlatGraph


def hypers_of(signature: Signature) -> tuple[str, ...]:
    """What a prologue is given of each param group, beside the counts of each tensor: numbers, in this order.

    The hyperparameters; the step, 1 or 2, of an algorithm whose state holds none; the `Extras.numbers`; the scale of
    the gradients.
    """
    declaration = signature.rule.declaration
    step = () if declaration.counts else ("step",)
    numbers = (*declaration.numbers, *step, *signature.rule.extras.numbers)
    return (*numbers, *(("grad_scale",) if signature.scaled else ()))


def constants_of(signature: Signature, hyper: Any) -> tuple[tuple[str, Any], ...]:
    """`Signature.constants`: the names and values of the options of a param group that are no numbers."""
    numbers = signature.rule.declaration.numbers
    return tuple((name, value) for name, value in hyper._asdict().items() if name not in numbers)


def trace_prologue(signature: Signature) -> FlatGraph:
    """Traces ``scalars`` on the device, in float64.

    Its inputs are vectors: the counts, which it advances, the `hypers_of` the signature, and `Signature.factors`, which
    it writes in the dtype of the kernel's arithmetic.

    Raises:
        inductor.UntraceableError: if ``scalars`` raises, as it does if it decides by the value of a tensor.
    """
    rule, declaration = signature.rule, signature.rule.declaration
    counts, hypers = len(declaration.counts), hypers_of(signature)

    def body(*vectors: Any) -> list[Any]:
        given = dict(zip(hypers, vectors[counts:], strict=False))
        h = declaration.hyper_type(**dict(signature.constants), **{name: given[name] for name in declaration.numbers})
        step = vectors[0] + 1 if counts else given["step"]
        made, carried = evaluate(rule, h, (step, *vectors[1:counts]), given)
        if signature.scaled:
            made = {**made, "grad_scale": given["grad_scale"]}
        # Each result reads the step, because Inductor fuses only what has an input in common.
        zero = step * 0
        factors = [(zero + made[name]).to(signature.scalar_dtype) for name in signature.factors]
        return [*([step] if counts else []), *(zero + value for value in carried), *factors]

    dtypes = [torch.float64] * (counts + len(hypers)) + [signature.scalar_dtype] * len(signature.factors)
    try:
        graph, mode, inputs = inductor.trace_flat(body, dtypes, (), "cuda")
    except Exception as error:  # from a user's rule, or from private parts of torch
        name = f"the scalars of {signature.name}"
        raise inductor.UntraceableError(f"{name} cannot be computed on the device: {brief(error)}") from error
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, (*declaration.counts, *hypers, *signature.factors), strict=True):
        node.meta["role"] = name
    write(graph, [*placeholders[:counts], *placeholders[counts + len(hypers) :]])
    return FlatGraph(f"the scalars of {signature.name}", graph, mode, inputs)
