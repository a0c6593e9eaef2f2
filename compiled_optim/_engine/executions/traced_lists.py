"""The rule on lists of tensors, for a compiler to trace: in a user's graph, or in the one that ``"foreach"`` compiles.

What ``scalars`` makes of the hyperparameters comes in a table, computed in float64 on the host as everywhere, so no
value of theirs is in the graph. Where step counts must stay on their device, the table holds the hyperparameters
themselves, and the graph evaluates ``scalars``.

``"foreach"`` is for devices without a launcher, for rules that are not one fusible loop, and by name. Unlike a launch
over pointer tables, its compile time grows with the model and each pattern of missing gradients is a graph of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from time import perf_counter
from types import FunctionType, MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_optim._engine.cache.trust import directory_problem
from compiled_optim._engine.declaration import Declaration, Group
from compiled_optim._engine.executions import lists, survey
from compiled_optim._engine.executions.state import Journal, counted_on_device, withdraw
from compiled_optim._engine.executions.survey import Member, Values
from compiled_optim._engine.executions.work import Work, hyper_tensors
from compiled_optim._engine.fallback import Fallback
from compiled_optim._engine.one_pass import arithmetic_dtype
from compiled_optim._engine.rule import Namespace, Rule, apply, evaluate
from compiled_optim._engine.torch_private import dynamo, inductor
from compiled_optim._engine.values import TensorList
from compiled_optim.declare import Number

# The tensors of a list: parameters, gradients, state by name, and step counts where a graph advances them.
Columns = tuple[list[Tensor], list[Tensor], dict[str, list[Tensor]], list[list[Tensor]]]
Sources = tuple[tuple[Any, ...] | None, ...]
_graph_numbers = itertools.count()
_graphs: dict[Any, ListGraph] = {}


class ScalarTable(NamedTuple):
    """The table of one graph, ``[rows, columns]``.

    Attributes:
        rows: for each, a param group and the position of a parameter whose scalars it holds, or -1 if it holds the
            hyperparameters of the group.
        columns: the most that a row has.
        names: of its columns, for each row.
    """

    rows: tuple[tuple[int, int], ...]
    columns: int
    names: tuple[tuple[str, ...], ...]
    dtype: torch.dtype

    def fill(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """The table on the host, of what ``scalars`` returned or of `numbers_of` hyperparameters.

        Raises:
            ValueError: where the scalars have other names than those for which the graph was made.
        """
        values = []
        for row, names in zip(rows, self.names, strict=True):
            if tuple(row) != names:
                raise ValueError(f"scalars must return the same scalars in every step, {list(names)}, got {list(row)}")
            values.append([float(v) for v in row.values()] + [0.0] * (self.columns - len(row)))
        return torch.tensor(values, dtype=self.dtype, device="cpu")


class Part(NamedTuple):
    """Parameters that are updated as one list.

    Attributes:
        members: their positions in the step.
        rows: the row of the table that each of them takes its scalars from.
        width: the dtype of the scalars.
        switches: in the order of the rule's switches.
        buffers: the names of the state tensors that the rule updates.
        names: of the row's columns.
        sources: None, or for each name where a graph that evaluates ``scalars`` finds the hyperparameter: None for the
            table, (list position, element) for a tensor, and (value,) for an option.
    """

    members: tuple[int, ...]
    rows: tuple[int, ...]
    width: torch.dtype
    switches: tuple[bool, ...]
    buffers: tuple[str, ...]
    names: tuple[str, ...]
    sources: Sources | None


def arrange(
    work: Work,
    updates: Mapping[int, Member],
    switches: Sequence[tuple[bool, ...]],
    equal: Sequence[bool],
    hyper: Sequence[Tensor],
    scalar_names: Callable[[int], Iterable[str]],
) -> tuple[ScalarTable, list[Part]]:
    """Orders a step as lists, and says where in a table their scalars stand.

    Args:
        updates: by position.
        switches: for each param group.
        equal: for each param group, whether one step count holds for all its parameters; otherwise each has a row of
            its own, so that a graph does not depend on which of them differ.
        hyper: the hyperparameters that are tensors, where those of the groups that are ``counted_on_device`` are found.
        scalar_names: of the update at a position.
    """
    rows: dict[tuple[int, int], int] = {}
    names: list[tuple[str, ...]] = []
    firsts: dict[int, int] = {}
    sources: dict[int, Any] = {}
    found: dict[Any, list[tuple[int, int]]] = {}
    for i, u in updates.items():
        g = u.group
        if g not in sources:
            group, declaration = work.groups[g], work.rule.declaration
            sources[g] = _sources(declaration, group, hyper) if counted_on_device(group) else None
            if sources[g] is not None:
                sources[g] += (None,) * len(work.rule.extras.numbers)
            firsts[g] = i
        at = (g, -1 if sources[g] is not None else firsts[g] if equal[g] else i)
        if at not in rows:
            rows[at] = len(rows)
            of_device = (*work.rule.declaration.hyper_type._fields, *work.rule.extras.numbers)
            names.append(tuple(scalar_names(i)) if at[1] >= 0 else of_device)
        row = rows[at]
        key = (u.turn, u.kind[1:], switches[g], u.buffers, names[row], sources[g])
        found.setdefault(key, []).append((i, row))
    parts = []
    for (*_, on, buffers, of_row, of_group), pairs in sorted(found.items(), key=lambda item: item[0][0]):
        members, rows_of = zip(*pairs, strict=True)
        width = arithmetic_dtype(updates[members[0]].param.dtype).to_real() if of_group is None else torch.float64
        parts.append(Part(members, rows_of, width, on, buffers, of_row, of_group))
    widths = {part.width for part in parts}
    dtype = widths.pop() if len(widths) == 1 else torch.float64
    return ScalarTable(tuple(rows), max(map(len, names)), tuple(names), dtype), parts


def _sources(declaration: Declaration, group: dict[str, Any], hyper: Sequence[Tensor]) -> Sources:
    places = {id(t): i for i, t in enumerate(hyper)}
    sources: list[Any] = []
    for option, field in declaration.options.items():
        value = group[option]
        for i, part in enumerate(value if isinstance(field.default, tuple) else (value,)):
            if isinstance(value, Tensor):
                sources.append((places[id(value)], i))
            elif isinstance(part, Tensor):
                sources.append((places[id(part)], 0))
            else:
                sources.append(None if isinstance(field, Number) else (part,))
    return tuple(sources)


def numbers_of(hyper: Any, given: Mapping[str, Any] = MappingProxyType({})) -> dict[str, float]:
    """Hyperparameters, and the `Extras.numbers` that are ``given``, as a row of a table.

    It has 0 for tensors, which stay where they are, and for other options.
    """
    return {name: float(v) if isinstance(v, Real) else 0.0 for name, v in {**hyper._asdict(), **given}.items()}


# ---- traced by Dynamo


def update_parts(
    rule: Rule,
    parts: Sequence[tuple[Any, ...]],
    tensors: Sequence[Columns],
    table: Tensor,
    hyper: Sequence[Tensor],
    factor: Tensor | None = None,
) -> None:
    """A step of these lists in place.

    Args:
        parts: each a `Part` as a plain tuple, which can be a constant of a graph.
        factor: of the gradients, if it is not in the table.
    """
    names_of_switches = rule.declaration.switch_type._fields
    for (_, row_of, width, switches, _, names, sources), columns in zip(parts, tensors):  # noqa: B905
        on = Namespace(dict(zip(names_of_switches, switches)))  # noqa: B905
        device = columns[0][0].device
        cells = [row.unbind() for row in table.to(device, width).unbind()]
        if sources is None:
            scalars = {name: [cells[row][j] for row in row_of] for j, name in enumerate(names)}
        else:
            values = {
                name: cells[row_of[0]][j] if s is None else hyper[s[0]].reshape(-1)[s[1]] if len(s) == 2 else s[0]
                for j, (name, s) in enumerate(zip(names, sources))  # noqa: B905
            }
            scalars = _evaluate_on_device(rule, values, columns[3])
        if factor is not None:
            scalars["grad_factor"] = [factor.to(device, width)] * len(row_of)
        _update_list(rule, on, columns, scalars)


def _evaluate_on_device(rule: Rule, given: dict[str, Any], counts: list[list[Tensor]]) -> dict[str, list[Any]]:
    """The scalars of step counts that only their device reads; advances these.

    ``given``: the hyperparameters and the `Extras.numbers`.
    """
    length = len(counts[0])
    step, *carried = [torch.stack(tensors) for tensors in counts]
    values, after = evaluate(rule, Namespace(given), (step + 1, *carried), given)
    torch._foreach_add_(counts[0], 1)
    for tensors, value in zip(counts[1:], after):  # noqa: B905
        torch._foreach_copy_(tensors, (torch.zeros_like(step) + value).unbind())
    return {k: list(v.unbind()) if isinstance(v, Tensor) and v.dim() else [v] * length for k, v in values.items()}


def _update_list(rule: Rule, on: Any, tensors: Columns, scalars: dict[str, list[Any]]) -> None:
    """Updates a list in place, with scalars for each of its tensors."""
    params, grads, state, _ = tensors
    columns = [params, grads, *state.values()]
    if params[0].is_complex():
        columns = [[torch.view_as_real(t.resolve_conj()) for t in column] for column in columns]
    if rule.elementwise:
        # the scalars as lists, too: Dynamo takes a list value times a tensor for an operation of the tensor
        values = [{name: TensorList(each) for name, each in scalars.items()}]
        found: Any = [[TensorList(column) for column in columns]]
    else:
        values = [{name: each[i] for name, each in scalars.items()} for i in range(len(params))]
        found = zip(*columns)  # noqa: B905
    for k, (p, g, *buffers) in zip(values, found):  # noqa: B905
        new, made = apply(rule, on, p, g, dict(zip(state, buffers)), k)  # noqa: B905
        for target, value in zip([p, *buffers], [new, *[made[name] for name in state]]):  # noqa: B905
            if rule.elementwise:
                target.copy_(value)
            else:  # Inductor of torch 2.13 drops a `copy_` into a 0-d tensor of float64
                torch._foreach_copy_([target], [value])


# ---- compiled as "foreach"


@dataclass
class ListGraph:
    """A compiled step; ``launches``: the kernels Inductor generated for it."""

    name: str
    function: Callable[..., None]
    devices: tuple[torch.device, ...]
    dtypes: tuple[torch.dtype, ...]
    tensors: int
    elements: int
    seconds: float = 0.0
    launches: int = 0
    origin: str = "compiled"


def forget() -> None:
    """Drops the compiled graphs."""
    _graphs.clear()


def prepare(
    work: Work, fallback: Fallback, only: Iterable[tuple[int, Tensor]] | None = None
) -> Callable[[], tuple[list[ListGraph], str]]:
    """One step in one graph of all parameters, or of those in ``only`` (group, parameter).

    What there is to raise is raised here, where nothing is changed. Parameters that share memory are updated one after
    the other, by a graph for each turn.

    Returns:
        A function that takes the step. It compiles a graph before it writes anything, and returns the graphs that ran
        and why the rest of the step was eager.
    """
    on_device = [counted_on_device(group) for group in work.groups]
    choose = work.rule.declaration.read
    choices = [choose(group, keep_tensors=on) for group, on in zip(work.groups, on_device, strict=True)]
    updates = survey.look(work, choices, only)
    sparse = [(u.group, u.listed) for u in updates if u.grad.is_sparse]
    if sparse:
        fallback.tell("sparse gradients are applied eagerly", "the other parameters are compiled")
        updates = [u for u in updates if not u.grad.is_sparse]
    eagerly = lists.prepare(work, sparse) if sparse else None

    def scalars(group: int, counts: Sequence[Any]) -> Values:
        return work.evaluate(choices[group].hyper, counts)

    with torch.no_grad():
        found = survey.in_order(updates, scalars, on_device)
    values_of = {id(u): values for members, values, _ in found for u in members}

    def take() -> tuple[list[ListGraph], str]:
        graphs: list[ListGraph] = []
        journal: Journal = []
        reason, rest = "", eagerly
        try:
            survey.commit(work, choices, updates, journal)
            for turn in sorted({u.turn for u in updates}):
                try:
                    graphs.append(_run(work, choices, [u for u in updates if u.turn == turn], values_of))
                except Exception as error:
                    reason = fallback.give_up(f"torch.compile failed: {error}", "build it with compiled=False")
                    withdraw(work, journal)
                    rest = lists.prepare(work, sparse + [(u.group, u.listed) for u in updates if u.turn >= turn])
                    break
                for members, values, at in found:
                    if at == turn:
                        survey.advance(members, None if values is None else values[1])
        except BaseException:
            withdraw(work, journal)
            raise
        if rest is not None:
            rest()
        return graphs, reason

    return torch.no_grad()(take)


def _run(work: Work, choices: list[Group], updates: list[Member], values_of: dict[int, Any]) -> ListGraph:
    """Updates these; ``values_of``: each, by id, what `evaluate` returned, or None where the graph evaluates."""
    hyper = [t for group in work.groups if counted_on_device(group) for t in hyper_tensors(group)]
    switches = [tuple(choice.switches) for choice in choices]
    evaluated = [values_of[id(u)] for u in updates]
    differing = {(u.group, id(values)) for u, values in zip(updates, evaluated, strict=True)}
    equal = [sum(g == group for g, _ in differing) == 1 for group in range(len(choices))]
    table, parts = arrange(work, dict(enumerate(updates)), switches, equal, hyper, lambda i: evaluated[i][0])
    given = {name: work.given[name] for name in work.rule.extras.numbers}
    there: dict[str, Any] = {} if work.factor is None else {"grad_factor": 0.0}
    rows = [
        {**evaluated[i][0], **there} if i >= 0 else numbers_of(choices[group].hyper, given) for group, i in table.rows
    ]
    tensors = [_columns(work.rule, part, [updates[i] for i in part.members]) for part in parts]
    # What Dynamo guards, so that it never compiles another graph by itself. State is laid out as its parameter.
    kinds = [updates[part.members[0]].kind[1:] for part in parts]
    guarded = [
        (type(p), type(g), p.shape, p.stride(), g.stride(), p.requires_grad, g.requires_grad)
        for p, g in [(u.param, u.grad) for u in updates]
    ]
    given_there = [*hyper, *([] if work.factor is None else [work.factor])]
    key = (work.rule, table, *parts, *kinds, *guarded, *[(t.shape, t.dtype, t.device) for t in given_there])
    graph = _graphs.get(key)
    if graph is None:
        params = [u.param for u in updates]
        graph = ListGraph(
            f"{work.rule.name}[{len(params)} tensors]",
            _compile(work.rule, parts),
            tuple(dict.fromkeys(p.device for p in params)),
            tuple(dict.fromkeys(p.dtype for p in params)),
            len(params),
            sum(p.numel() * (1 + p.is_complex()) for p in params),
        )
    started, generated = perf_counter(), inductor.kernels_generated()
    graph.function(tensors, table.fill(rows), hyper, work.factor)
    if key not in _graphs:
        graph.seconds, graph.launches = perf_counter() - started, inductor.kernels_generated() - generated
        _graphs[key] = graph
    else:
        graph.origin = "memory"
    return graph


def _columns(rule: Rule, part: Part, members: list[Member]) -> Columns:
    def column(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]

    state = {name: column([u.state[name] for u in members]) for name in part.buffers}
    counts = [[u.state[name] for u in members] for name in rule.declaration.counts if part.sources is not None]
    # Dynamo takes no tensor whose own gradient is of another dtype
    params = [u.param if u.param.dtype == u.grad.dtype else u.param.detach() for u in members]
    return column(params), column([u.grad for u in members]), state, counts


def _compile(rule: Rule, parts: list[Part]) -> Callable[..., None]:
    # What `torch.compile` builds is loaded from its own directory, which must be as private as ours.
    if problem := directory_problem(inductor.inductor_directory()):
        raise RuntimeError(f"Inductor's directory cannot be trusted: {problem}; set TORCHINDUCTOR_CACHE_DIR to another")
    constant = tuple(map(tuple, parts))
    arranged = dynamo.constant_in_graphs(lambda: constant)

    def step(tensors: list[Columns], table: Tensor, hyper: list[Tensor], factor: Tensor | None = None) -> None:
        update_parts(rule, arranged(), tensors, table, hyper, factor)

    # Dynamo keeps its graphs, and their limit of 8, by code object: each step gets one of its own.
    code = step.__code__.replace(co_name=f"foreach_step_{next(_graph_numbers)}")
    fresh = FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)
    # At the default of 30 operations Inductor stores intermediate results of the size of a parameter.
    options: dict[str, Any] = {"realize_opcount_threshold": 1000, "compile_threads": 1}
    return torch.compile(fresh, fullgraph=True, dynamic=False, options=options)
