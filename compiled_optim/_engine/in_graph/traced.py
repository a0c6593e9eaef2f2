"""The update rule traced into the user's graph, as lists of tensors: a step that is not compiled by itself.

An operator before it counts the step and returns what ``scalars`` makes of the hyperparameters, in float64 on the host
as everywhere; so no value of theirs is in the graph, and nothing is computed per element that could be per step.
Where ``capturable``, the operator returns the hyperparameters only, and step counts are read on their device.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_optim._engine.declaration import Declaration
from compiled_optim._engine.executions import checks, lists, survey
from compiled_optim._engine.executions.checks import PLAIN
from compiled_optim._engine.executions.memory import Memory
from compiled_optim._engine.executions.state import count_tensor, make_state
from compiled_optim._engine.executions.survey import Member
from compiled_optim._engine.in_graph.counts import Counts
from compiled_optim._engine.in_graph.handles import TOKEN, Handle, Inputs, operator, same
from compiled_optim._engine.rule import Namespace, arithmetic_dtype, evaluate, first_scalars
from compiled_optim._engine.torch_private import dynamo
from compiled_optim._engine.values import TensorList
from compiled_optim.declare import Number


class Layout(NamedTuple):
    """What the operator must know of a graph; graphs name it by number, for all optimizers alike.

    ``rows`` of the table: a param group, and a parameter whose scalars they are (-1: the hyperparameters themselves).
    ``members``: the parameters that are updated, by position; ``counted``: those whose steps the host counts, and
    ``row_of`` each of these.
    """

    rows: tuple[tuple[int, int], ...]
    members: tuple[int, ...]
    counted: tuple[int, ...]
    row_of: tuple[int, ...]


_numbers: dict[Layout, int] = {}
_layouts: list[Layout] = []


class Part(NamedTuple):
    """Parameters that are updated as one list.

    ``width``: the dtype of their scalars. ``hyper``: of a capturable group, where its hyperparameters are.
    """

    members: tuple[int, ...]
    row_of: tuple[int, ...]
    width: torch.dtype
    switches: tuple[bool, ...]
    buffers: tuple[str, ...]
    hyper: tuple[tuple[str, Any], ...] | None


class RuleInputs(Inputs):
    """Of an optimizer that is not compiled: its state, too.

    ``states`` are the dicts of the optimizer's own state, in the order of the parameters. One that a graph is the first
    to need is made when that is traced, and becomes the optimizer's when it runs; until then it stands in ``_made``.
    """

    def __init__(self, optimizer: Any) -> None:
        self.states: list[dict[str, Any]] = []
        self._counts = Counts((), torch.float32, [], [])
        self._groups: list[int] = []  # of each parameter
        # the optimizer's, and what they held last of a few names: whoever replaces, empties or fills one changes that
        self._live: list[dict[str, Any]] = []
        self._held: dict[str, list[Any]] = {}
        self._made: set[int] = set()
        self._cannot = ""
        self._memory = Memory()
        self._share_memory = False
        super().__init__(optimizer)

    def look(self) -> bool:
        optimizer = self.optimizer
        changed = super().look()
        shared, self._share_memory = self._share_memory, self._look_for_shared_memory(optimizer)
        if changed or shared != self._share_memory or not self._is_as_left(optimizer):
            had = set() if changed else self._counts.placed
            self._gather(optimizer)
            self._make(had, _switches(optimizer))  # what was taken away is made again, for graphs take it in
        return changed

    def _look_for_shared_memory(self, optimizer: Any) -> bool:
        states = [optimizer.state.get(p, {}).values() for p in self.params]
        written = [[p, *[v for v in s if isinstance(v, Tensor)]] for p, s in zip(self.params, states, strict=True)]
        read = [p.grad for p in self.params]
        return any(self._memory.turns(written, [TOKEN if g is None else g for g in read]))

    def _is_as_left(self, optimizer: Any) -> bool:
        live = [*optimizer.state.values()]
        watched = self._held.items()
        return same(live, self._live) and all(same([state.get(name) for state in live], held) for name, held in watched)

    def _watch(self, optimizer: Any) -> None:
        live = self._live = [*optimizer.state.values()]
        names = optimizer.declaration.counts or tuple(optimizer.declaration.buffers)
        self._held = {name: [state.get(name) for state in live] for name in names}

    def _gather(self, optimizer: Any) -> None:
        groups, params = optimizer.param_groups, self.params
        self._groups = [i for i, group in enumerate(groups) for _ in group["params"]]
        self.states = [optimizer.state.get(p) or {} for p in params]
        self._made = set()
        on_host = [i for i, g in enumerate(self._groups) if not groups[g].get("capturable")]
        names = optimizer.declaration.counts if on_host else ()
        dtype = count_tensor(torch.empty((), device="cpu"), {}, 0.0).dtype
        self._counts = Counts(names, dtype, self._groups, self.states)
        self._cannot = "" if set(map(type, params)) <= set(PLAIN) else "a tensor subclass"
        if self._share_memory:  # as a parameter that is listed twice does
            self._cannot = "tensors that share memory"
            return
        for i in on_host:
            if self.states[i] and all(self.states[i].get(name) is not None for name in names):
                self._counts.place(i)

    def guarded(self) -> list[Any]:
        guarded, optimizer = super().guarded(), self.optimizer
        switches = _switches(optimizer)
        if not any(self.states):
            # a graph of another instance, perhaps, which takes in the state of all that is trained
            self._make([i for i, p in enumerate(self.params) if p.requires_grad], switches)
        capturable = [bool(group.get("capturable")) for group in optimizer.param_groups]
        return [*guarded, self._cannot, switches, capturable, self._counts.are_equal()]

    def _make(self, members: Iterable[int], switches: list[tuple[bool, ...]]) -> None:
        """Makes the state that these parameters lack."""
        optimizer = self.optimizer
        for i in () if self._share_memory else members:
            self._make_one(optimizer, i, switches[self._groups[i]])
        self._watch(optimizer)

    def _make_one(self, optimizer: Any, i: int, switches: tuple[bool, ...]) -> None:
        options = optimizer.param_groups[self._groups[i]]
        made = make_state(optimizer._work(), self.params[i], options, optimizer.declaration.switch_type(*switches))
        made = {name: value for name, value in made.items() if self.states[i].get(name) is None}
        if not made:
            return
        if not self.states[i]:
            self._made.add(i)
        self.states[i].update(made)
        if any(name in optimizer.declaration.buffers for name in made):
            self._counts.fresh.add(i)
        if not options.get("capturable"):
            self._counts.place(i)

    @dynamo.constant_in_graphs
    def refuses(self) -> bool:
        """Whether this step cannot be traced, and is an operator nevertheless."""
        optimizer = self.optimizer
        work = optimizer._work()
        sparse = not optimizer.accepts_dense or any(p.grad is not None and p.grad.is_sparse for p in self.params)
        if sparse or self._cannot:
            return True
        choices, declaration = work.read(keep_tensors=True), optimizer.declaration
        try:
            survey.look(work, choices)
            for choice in choices:
                first_scalars(optimizer.rule, choice.hyper)
            for p, group, state in zip(self.params, self._groups, self.states, strict=True):
                for name in declaration.kept(choices[group].switches):
                    if state.get(name) is not None:
                        checks.check_buffer(work, p, name, state[name], p.shape)
        except Exception:
            return True  # and raises when it runs, if it still concerns what is updated then
        return False

    @dynamo.constant_in_graphs
    def prepare(self, present: tuple[bool, ...]) -> tuple[Any, ...]:
        """Makes what is missing for a graph in which these parameters have a gradient.

        Returns:
            The number of its `Layout`; rows, columns and dtype of its table; the names of the scalars; its parts.
        """
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        declaration, switches = optimizer.declaration, _switches(optimizer)
        members = [i for i, yes in enumerate(present) if yes]
        self._make(members, switches)
        equal = self._counts.are_equal()
        rows: dict[tuple[int, int], int] = {}
        firsts: dict[int, int] = {}
        counted: list[tuple[int, int]] = []
        parts: dict[Any, list[tuple[int, int]]] = {}
        names: tuple[str, ...] = ()
        for i in members:
            g, p = self._groups[i], self.params[i]
            buffers = declaration.kept(declaration.switch_type(*switches[g]))
            if groups[g].get("capturable"):
                hyper, width = _sources(declaration, groups[g], self.hyper), torch.float64
                row = rows.setdefault((g, -1), len(rows))
            else:
                hyper, width = None, arithmetic_dtype(p.dtype).to_real()
                row = rows.setdefault((g, firsts.setdefault(g, i) if equal[g] else i), len(rows))
                counted.append((i, row))
                if not names:
                    h = declaration.read(groups[g]).hyper
                    names = tuple(evaluate(optimizer.rule, h, self._counts.next(i))[0])
            dtypes = tuple(self.states[i][name].dtype for name in buffers)
            parts.setdefault((p.device, p.dtype, dtypes, width, switches[g], buffers, hyper), []).append((i, row))
        lists = [Part(*map(tuple, zip(*pairs, strict=True)), *key[3:]) for key, pairs in parts.items()]  # type: ignore[arg-type]
        state = (self.states[i][name] for part in lists for i in part.members for name in part.buffers)
        dynamo.mark_static([*self.params, *state])
        layout = Layout(tuple(rows), tuple(members), tuple(i for i, _ in counted), tuple(row for _, row in counted))
        if layout not in _numbers:
            _numbers[layout] = len(_layouts)
            _layouts.append(layout)
        columns = max(len(names), *(len(part.hyper or ()) for part in lists))
        widths = {part.width for part in lists}
        dtype = widths.pop() if len(widths) == 1 else torch.float64
        return _numbers[layout], len(rows), columns, dtype, names, tuple(map(tuple, lists))

    def count(self, layout: Layout, columns: int, dtype: torch.dtype) -> Tensor:
        """The table of a step, ``[rows, columns]``; counts the step."""
        optimizer = self.optimizer
        optimizer._check_schedule()
        rule, read = optimizer.rule, optimizer.declaration.read
        choices = [read(group, keep_tensors=bool(group.get("capturable"))) for group in optimizer.param_groups]
        table, carried = [], []
        for group, i in layout.rows:
            hyper = choices[group].hyper
            values, after = evaluate(rule, hyper, self._counts.next(i)) if i >= 0 else (hyper._asdict(), ())
            row = [v if type(v) is float else float(v) if isinstance(v, Real) else 0.0 for v in values.values()]
            table.append(row + [0.0] * (columns - len(row)))
            carried.append(after)
        self._counts.advance(layout.counted, [carried[row] for row in layout.row_of] if any(carried) else ())
        if self._made:
            self._give(optimizer, layout.members)
        optimizer._stepped()
        return torch.tensor(table, dtype=dtype, device="cpu")

    def _give(self, optimizer: Any, members: tuple[int, ...]) -> None:
        """The state that was made becomes the optimizer's."""
        for i in self._made.intersection(members):
            optimizer.state[self.params[i]] = self.states[i]
        self._made.difference_update(members)
        self._watch(optimizer)


def _switches(optimizer: Any) -> list[tuple[bool, ...]]:
    """Of each param group; a number that is a tensor is on, for its device may have to be waited for."""
    names = optimizer.declaration.switch_type._fields
    groups = optimizer.param_groups
    return [tuple([isinstance(v, Tensor) or bool(v) for v in map(group.__getitem__, names)]) for group in groups]


def _sources(declaration: Declaration, group: dict[str, Any], hyper: list[Tensor]) -> tuple[tuple[str, Any], ...]:
    """Where a graph finds the hyperparameters of a capturable group, by name.

    Of a tensor its place in ``hyper``, as an int; of another number its column in the table, in a tuple; and the value
    of an option, in a tuple of two.
    """
    places = {id(t): i for i, t in enumerate(hyper)}
    sources: list[tuple[str, Any]] = []
    names = iter(declaration.hyper_type._fields)
    for option, field in declaration.options.items():
        value = group[option]
        for part in value if isinstance(field.default, tuple) else (value,):
            column = (len(sources),) if isinstance(field, Number) else (len(sources), part)
            sources.append((next(names), places.get(id(part), column)))
    return tuple(sources)


def _table(handle: Any, token: Tensor, hyper: Any, layout: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="cpu")


@operator(_table, "token", "hyper")
def count(
    handle: Handle, token: Tensor, hyper: list[Tensor], layout: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    inputs = handle.owner()._inputs  # type: ignore[union-attr]
    return inputs.run(lambda: inputs.count(_layouts[layout], columns, dtype), (hyper, inputs.hyper))  # type: ignore[no-any-return]


def trace(optimizer: Any, inputs: RuleInputs) -> bool:
    """The step, if there is any gradient; traced by Dynamo."""
    present = tuple([p.grad is not None for p in inputs.params])
    if not any(present):
        return False
    layout, rows, columns, dtype, names, parts = inputs.prepare(present)
    table = torch.ops.compiled_optim.count(inputs.id, TOKEN, inputs.hyper, layout, rows, columns, dtype)
    for members, row_of, width, switches, buffers, hyper in parts:
        params = [inputs.params[i] for i in members]
        grads = [inputs.params[i].grad for i in members]
        state = {name: [inputs.states[i][name] for i in members] for name in buffers}
        on = Namespace(dict(zip(optimizer.declaration.switch_type._fields, switches)))  # noqa: B905
        cells = [row.unbind() for row in table.to(params[0].device, width).unbind()]
        if hyper is None:
            scalars = {name: [cells[row][j] for row in row_of] for j, name in enumerate(names)}
        else:
            scalars = _scalars_on_device(optimizer, inputs, members, cells[row_of[0]], hyper)
        lists.update_lists(optimizer.rule, on, params, grads, state, scalars)
    return True


def _scalars_on_device(
    optimizer: Any, inputs: RuleInputs, members: tuple[int, ...], row: Any, sources: Any
) -> dict[str, list[Any]]:
    """Those of a capturable group, from step counts on the device; traced by Dynamo."""
    values: dict[str, Any] = {}
    for name, source in sources:
        if isinstance(source, int):
            values[name] = inputs.hyper[source].reshape(())
        else:
            values[name] = source[1] if len(source) == 2 else row[source[0]]
    h = Namespace(values)
    rule, counts = optimizer.rule, optimizer.declaration.counts
    counted = []
    for i in members:
        state = {name: inputs.states[i][name] for name in counts}
        counted.append(Member(0, inputs.params[i], inputs.params[i], None, state, (), counts))
    found, carried = lists.on_device(counted, lambda group, counts: evaluate(rule, h, counts))
    survey.advance(counted, carried)
    return {k: list(v.tensors) if isinstance(v, TensorList) else [v] * len(members) for k, v in found.items()}
