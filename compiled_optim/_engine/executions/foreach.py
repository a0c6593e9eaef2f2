"""The "foreach" lowering: plain ``torch.compile`` of the rule on lists of tensors.

For devices without a launcher, for rules that are not one fusible loop, and by name. Unlike a launch over pointer
tables, its compile time grows with the model and each pattern of missing gradients is a graph of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.cache.trust import directory_problem
from compiled_optim._engine.executions.lists import update_lists
from compiled_optim._engine.executions.survey import Member, Scalars, advance, in_order
from compiled_optim._engine.rule import Rule, arithmetic_dtype
from compiled_optim._engine.torch_private import inductor

_numbers = itertools.count()
_graphs: dict[Any, Graph] = {}


@dataclass
class Graph:
    """One compiled list step; ``launches``: the kernels Inductor generated for it."""

    name: str
    function: Callable[..., None]
    device: torch.device
    dtype: torch.dtype
    tensors: int
    elements: int
    seconds: float = 0.0
    launches: int = 0
    origin: str = "compiled"


class Unfinished(Exception):
    """A graph could not be compiled; ``updates`` are those that were not done."""

    def __init__(self, updates: list[Member]) -> None:
        super().__init__(f"{len(updates)} updates were not done")
        self.updates = updates


def forget() -> None:
    """Drops the compiled graphs."""
    _graphs.clear()


def run(rule: Rule, updates: list[Member], switches: list[Any], scalars: Scalars) -> list[Graph]:
    """Members parameters and state in place, one compiled graph for each list; returns the graphs that ran.

    Raises:
        Unfinished: when ``torch.compile`` raises.
    """
    left = in_order(updates, scalars, [False] * len(switches))
    graphs: list[Graph] = []
    for i, (members, values, _) in enumerate(left):
        assert values is not None
        try:
            graphs.append(_run_list(rule, members, switches[members[0].group], *values))
        except Exception as error:
            raise Unfinished([u for members, _, _ in left[i:] for u in members]) from error
    return graphs


def _run_list(rule: Rule, members: list[Member], on: Any, values: dict[str, Any], after: tuple[Any, ...]) -> Graph:
    first = members[0]

    def column(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]

    params, grads = column([u.param for u in members]), column([u.grad.resolve_conj() for u in members])
    state = [column([u.state[name] for u in members]) for name in first.buffers]
    layout = tuple((t.shape, t.stride(), t.dtype) for tensors in (params, grads, *state) for t in tensors)
    key = (rule, on, first.buffers, tuple(values), first.param.device, layout)
    graph = _graphs.get(key)
    if graph is None:
        _check_directory()
        function = _compile(rule, on, first.buffers, tuple(values))
        name = f"{rule.name}[{len(params)} tensors]"
        elements = sum(p.numel() for p in params)
        graph = Graph(name, function, first.param.device, first.param.dtype, len(params), elements)
    # on the device and of the arithmetic's dtype, so that no value is a constant of the graph
    vector = torch.tensor(list(values.values()), dtype=arithmetic_dtype(params[0].dtype), device=first.param.device)
    started, generated = perf_counter(), inductor.kernels_generated()
    graph.function(params, grads, state, list(vector.unbind()))
    if key not in _graphs:
        graph.seconds, graph.launches = perf_counter() - started, inductor.kernels_generated() - generated
        _graphs[key] = graph
    else:
        graph.origin = "memory"
    advance(members, after)
    return graph


def _check_directory() -> None:
    """What ``torch.compile`` builds is loaded from its own directory, which must be as private as ours."""
    problem = directory_problem(inductor.inductor_directory())
    if problem:
        raise RuntimeError(f"Inductor's directory cannot be trusted: {problem}; set TORCHINDUCTOR_CACHE_DIR to another")


def _compile(rule: Rule, on: Any, buffers: tuple[str, ...], scalar_names: tuple[str, ...]) -> Callable[..., None]:
    def step(params: list[Tensor], grads: list[Tensor], state: list[list[Tensor]], scalars: list[Tensor]) -> None:
        values = {name: [k] * len(params) for name, k in zip(scalar_names, scalars)}  # noqa: B905
        update_lists(rule, on, params, grads, dict(zip(buffers, state)), values)  # noqa: B905

    # Dynamo keeps its graphs, and their limit of 8, by code object: each list of shapes gets one of its own.
    code = step.__code__.replace(co_name=f"foreach_step_{next(_numbers)}")
    fresh = FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)
    # At the default of 30 operations Inductor stores intermediate results of the size of a parameter.
    options: dict[str, Any] = {"realize_opcount_threshold": 1000, "compile_threads": 1}
    return torch.compile(fresh, fullgraph=True, dynamic=False, options=options)
