"""A rule as an FX graph over ONE flat tensor of symbolic length, so that one kernel serves every model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.kernels.references import Form, is_own, refer_to
from compiled_optim._engine.one_pass import arithmetic_dtype
from compiled_optim._engine.rule import Rule, apply
from compiled_optim._engine.torch_private import dynamo, inductor


@dataclass(frozen=True)
class Signature:
    """What decides a kernel: never a value of a hyperparameter, never a shape.

    ``buffers`` and ``scalars`` are names in the order the kernel takes them. ``dtypes`` are real, of the parameter and
    of each buffer; ``grad_dtype`` is that of the gradient, None if it is the parameter's. ``references`` is what a
    user's rule refers to, None for a rule of the package. ``backend`` is the name of the one that lowers it.

    For devices that the host does not wait for: ``on_device`` kernels read step counts, carried scalars and
    hyperparameters where they lie, and ``constants`` are the options that are no numbers, as pairs of name and value.
    ``scaled`` ones divide gradients by the scale of a GradScaler and write them back, as torch's fused optimizers do.
    ``by_rows`` ones update the rows that a sparse gradient touches.
    """

    rule: Rule
    switches: Any
    dtypes: tuple[torch.dtype, ...]
    buffers: tuple[str, ...]
    scalars: tuple[str, ...]
    references: Form | None = None
    backend: str = "cpu"
    on_device: bool = False
    constants: tuple[tuple[str, Any], ...] = ()
    scaled: bool = False
    by_rows: bool = False
    grad_dtype: torch.dtype | None = None

    @property
    def flat(self) -> tuple[str, ...]:
        return ("param", "grad", *self.buffers)

    @property
    def flat_dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.dtypes[0], self.grad_dtype or self.dtypes[0], *self.dtypes[1:])

    @property
    def factors(self) -> tuple[str, ...]:
        """What the kernel reads per tensor: the scalars, and the scale of the gradients."""
        return (*self.scalars, "grad_scale") if self.scaled else self.scalars

    @property
    def places(self) -> tuple[str, ...]:
        """What the kernel is told of each span: where in its tensor it begins, if elements are told apart."""
        return ("first",) if self.rule.rounds(self.dtypes[0]) else ()

    @property
    def scalar_dtype(self) -> torch.dtype:
        return arithmetic_dtype(self.dtypes[0])

    @property
    def name(self) -> str:
        """Readable and unique within a process: ``AdamW(decoupled_weight_decay)[float32]``."""
        on = ", ".join(filter(None, [*(k for k, v in self.switches._asdict().items() if v), str(self.rule.extras)]))
        dtypes = dict.fromkeys(str(d).removeprefix("torch.") for d in self.dtypes)
        device = f", {str(self.grad_dtype).removeprefix('torch.')} gradients" if self.grad_dtype else ""
        device += "" if self.backend == "cpu" else f" on {self.backend}"
        which = {self.rule.declaration.buffers[name].of for name in self.buffers} - {"all"}
        device += f", {which.pop()}" if which else ""
        for name in ("on_device", "scaled", "by_rows"):
            device += f", {name}" if getattr(self, name) else ""
        return f"{self.rule.name}({on})[{', '.join(dtypes)}{device}]"


@dataclass(frozen=True)
class Traced(inductor.FlatGraph):
    signature: Signature


def trace(signature: Signature, device: str = "cpu") -> Traced:
    """Traces the rule on fake tensors. The last nodes of the graph copy the results into the inputs.

    Raises:
        inductor.UntraceableError: if the rule raises, or if it is a user's and its trace does something else.
    """
    names = signature.flat + signature.factors + signature.places
    flat, scaled = len(signature.flat), signature.scaled

    def body(*values: Any) -> list[Any]:
        p, g, *buffers = values[:flat]
        state = dict(zip(signature.buffers, buffers, strict=True))
        scalars = dict(zip(names[flat:], values[flat:], strict=True))
        if scaled:
            g = g.to(signature.scalar_dtype) / scalars.pop("grad_scale")
        new, new_state = apply(signature.rule, signature.switches, p, g, state, scalars)
        unscaled = [g.to(signature.flat_dtypes[1])] if scaled else []
        return [new, *unscaled, *(new_state[name] for name in signature.buffers)]

    scalar_dtypes = [*[signature.scalar_dtype] * len(signature.factors), *[torch.int64] * len(signature.places)]
    try:
        graph, mode, inputs = inductor.trace_flat(body, list(signature.flat_dtypes), scalar_dtypes, device)
    except Exception as error:  # from a user's rule, or from private parts of torch
        raise _untraceable(signature, f"raised {brief(error)} while it was traced") from error
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node.meta["role"] = name
    write(graph, [placeholders[0], *placeholders[1 if scaled else 2 : flat]])
    traced = Traced(signature.name, graph, mode, inputs, signature)
    if not is_own(signature.rule.update):
        if device != "cpu" or signature.places:  # try what elements alone decide
            plain = signature.rule.extended(signature.rule.extras._replace(rounding=False))
            trace(replace(signature, scaled=False, rule=plain))
        else:
            _try(traced)
    return traced


def write(graph: torch.fx.GraphModule, targets: Sequence[torch.fx.Node]) -> None:
    """Makes a graph copy its results into these inputs instead of returning them."""
    output = next(n for n in graph.graph.nodes if n.op == "output")
    with graph.graph.inserting_before(output):
        for target, value in zip(targets, output.args[0], strict=True):
            node = graph.graph.call_function(torch.ops.aten.copy_.default, (target, value))
            node.meta["val"] = target.meta["val"]
    output.args = ([],)
    graph.recompile()


# ---- whether a user's rule is elementwise: it may look at shapes or other elements, write to inputs or count its calls

_SHAPES = ((6,), (2, 3), (), (1, 2, 3), (1, 1, 2, 3), (1, 1, 1, 2, 3), (1,))
_TRIALS = (2.0, 1.0, 20.0)  # the first with every shape


def _try(traced: Traced) -> None:
    """Compares the rule on small tensors of several shapes with its trace on each of their elements.

    Raises:
        inductor.UntraceableError: if they differ, or if the rule changes anything else than what it returns.
    """
    signature = traced.signature
    if traced.fake_mode.shape_env.guards:
        raise _untraceable(signature, "depends on how many elements there are")
    with dynamo.outside_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for i, shape in enumerate((*_SHAPES, *[_SHAPES[0]] * (len(_TRIALS) - 1))):
            scalars = [_TRIALS[max(0, i - len(_SHAPES) + 1)] ** (1 - 2 * k) for k in range(len(signature.scalars))]
            try:
                expected = _run_rule(signature, _sample(signature, shape), scalars)
            except Exception as error:
                raise _untraceable(signature, f"raised {brief(error)} when it was tried") from error
            if expected is None:
                raise _untraceable(signature, "writes to its inputs in place")
            # Element by element, because in a launch an update sees one element only.
            given = zip(*(torch.split(t.flatten(), 1) for t in _sample(signature, shape)), strict=True)
            columns = zip(*(_run_trace(traced, [*map(Tensor.clone, ts)], scalars) for ts in given), strict=True)
            actual = [torch.cat(column) for column in columns]
            if not all(_close(a, e) for a, e in zip(actual, expected, strict=True)):
                raise _untraceable(signature, f"does something else with a tensor of shape {shape} than with elements")
    if signature.references is not None and not refer_to(
        signature.rule.frozen(signature.on_device), signature.references
    ):
        raise _untraceable(signature, "changes what it refers to")


def _sample(signature: Signature, shape: tuple[int, ...]) -> list[Tensor]:
    """A parameter, a gradient, and state that is positive, as most is."""
    ends = [(-2.0, 3.0), (1.5, -1.0), *((0.5 + i, 2.0 + i) for i in range(len(signature.buffers)))]
    numel = torch.Size(shape).numel()
    pairs = zip(ends, signature.flat_dtypes, strict=True)
    return [torch.linspace(*both, numel, dtype=dtype, device="cpu").reshape(shape) for both, dtype in pairs]


def _run_rule(signature: Signature, values: list[Tensor], scalars: list[float]) -> list[Tensor] | None:
    """The new parameter and state, flat; None if the old ones, or the gradient, are no longer what they were."""
    kept = [*map(Tensor.clone, values)]

    def run(convert: Callable[[float], Any]) -> tuple[Tensor, dict[str, Tensor]]:
        state = dict(zip(signature.buffers, values[2:], strict=True))
        named = dict(zip(signature.scalars, map(convert, scalars), strict=True))
        return apply(signature.rule, signature.switches, values[0], values[1], state, named)

    try:
        new, new_state = run(float)
    except TypeError:  # an operand may have to be a tensor, as for `maximum`
        new, new_state = run(lambda k: torch.tensor(k, dtype=signature.scalar_dtype, device="cpu"))
    results = [new, *(new_state[name] for name in signature.buffers)]
    if not all(map(torch.equal, values, kept)):
        return None
    if any(r.shape != values[0].shape for r in results):
        raise ValueError(f"results of shapes {[tuple(r.shape) for r in results]} for {tuple(values[0].shape)}")
    return [r.flatten() for r in results]


def _run_trace(traced: Traced, values: list[Tensor], scalars: list[float]) -> list[Tensor]:
    width = traced.signature.scalar_dtype
    traced.graph(*values, *(torch.tensor(s, dtype=width, device="cpu") for s in scalars))
    return [values[0], *values[2:]]


def _close(actual: Tensor, expected: Tensor) -> bool:
    rounding = 16 * torch.finfo(expected.dtype).eps
    return torch.allclose(actual, expected, rtol=rounding, atol=rounding, equal_nan=True)


def _untraceable(signature: Signature, what: str) -> inductor.UntraceableError:
    return inductor.UntraceableError(f"the update of {signature.name} {what}")


def brief(error: Exception) -> str:
    """The kind of an error, and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
