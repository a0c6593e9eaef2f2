"""The update rule traced into the user's graph, as lists of tensors: a step that is not compiled by itself.

An operator before it counts the step and returns what ``scalars`` makes of the hyperparameters, in float64 on the host
as everywhere; so no value of theirs is in the graph, and nothing is computed per element that could be per step.
Where ``capturable``, the operator returns the hyperparameters only, and step counts are read on their device.
"""

from __future__ import annotations

import itertools
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from compiled_optim import eager, lower, updates
from compiled_optim.declare import Declaration, Number
from compiled_optim.in_graph.inputs import TOKEN, Handle, Inputs, operator, same
from compiled_optim.rule import Namespace, arithmetic_dtype, evaluate
from compiled_optim.tensor_list import TensorList
from compiled_optim.updates import Update

if TYPE_CHECKING:
    from compiled_optim.optimizer import Optimizer

_PLAIN = {torch.Tensor, torch.nn.Parameter}


class Layout(NamedTuple):
    """What the operator must know of a graph; graphs name it by number, for all optimizers alike.

    ``rows`` of the table: a param group, and a parameter whose scalars they are (-1: the hyperparameters themselves).
    ``members``: the parameters that are updated, by position, and ``row_of`` each.
    """

    rows: tuple[tuple[int, int], ...]
    members: tuple[int, ...]
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

    State that a graph is the first to need is made when that is traced, and becomes the optimizer's when it runs. Step
    counts, and other 0-d state, become views of one vector each: those of 150 parameters are read and counted in 5 us
    then, and in 150 one by one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.state: dict[str, list[Tensor | None]] = {}
        self._counts: dict[str, Tensor] = {}
        self._groups: list[int] = []  # of each parameter
        self._known: list[list[int]] = []  # of each param group: the parameters with state
        self._made: dict[int, dict[str, Any]] = {}
        self._entries: list[Any] = []
        super().__init__(optimizer)

    def look(self) -> None:
        old, optimizer = self.params, self.optimizer
        super().look()
        if not (same(self.params, old) and same(_entries(optimizer), self._entries)):
            self._gather(optimizer)

    def guarded(self) -> list[Any]:
        optimizer = self.optimizer
        if not any(self._known) and all(p.requires_grad for p in self.params):
            # a graph of another instance, perhaps, which takes in state
            for i, group in enumerate(self._groups):
                on = optimizer.declaration.switch_type(*_switches(optimizer)[group])
                self._make(i, on)
            self._know()
        capturable = tuple(bool(group.get("capturable")) for group in optimizer.param_groups)
        return [_refusal(optimizer), _switches(optimizer), capturable, self._uniform()]

    def _gather(self, optimizer: Optimizer) -> None:
        groups, declaration = optimizer.param_groups, optimizer.declaration
        self._groups = [i for i, group in enumerate(groups) for _ in group["params"]]
        self._made = {}
        states = [optimizer.state.get(p, {}) for p in self.params]
        self._counts = {}
        on_host = [not groups[g].get("capturable") for g in self._groups]
        for name in declaration.counts if any(on_host) else ():
            first = on_host.index(True)
            dtype = optimizer._count_tensor(self.params[first], groups[self._groups[first]], 0.0).dtype
            values = [float(state.get(name, 0.0)) if host else 0.0 for state, host in zip(states, on_host, strict=True)]
            self._counts[name] = vector = torch.tensor(values, dtype=dtype, device="cpu")
            for state, view, host in zip(states, vector.unbind(), on_host, strict=True):
                if host and name in state:
                    state[name] = view
        self.state = {name: [state.get(name) for state in states] for name in declaration.slots}
        self._entries = _entries(optimizer)
        self._know()

    def _know(self) -> None:
        self._known = [[] for _ in self.optimizer.param_groups]
        for i, group in enumerate(self._groups):
            if any(tensors[i] is not None for tensors in self.state.values()):
                self._known[group].append(i)

    def _next_counts(self) -> list[tuple[float, ...]]:
        """Of each parameter, as `Update.next_counts` has them."""
        if self._counts:
            step, *carried = (vector.tolist() for vector in self._counts.values())
            return list(zip([s + 1 for s in step], *carried, strict=True))
        buffers = self.optimizer.declaration.buffers
        fresh = {i for i, made in self._made.items() if any(name in buffers for name in made)}
        return [(1.0,) if i in fresh else (2.0,) for i in range(len(self.params))]

    def _uniform(self) -> tuple[bool, ...]:
        """Of each param group, whether its parameters all need the same scalars."""
        counts = self._next_counts()
        return tuple(len({counts[i] for i in known}) <= 1 for known in self._known)

    @lower.constant_in_graphs
    def refuses(self) -> bool:
        """Whether this step cannot be traced, and is an operator nevertheless."""
        optimizer = self.optimizer
        if _refusal(optimizer) or any(p.grad is not None and p.grad.is_sparse for p in self.params):
            return True
        try:
            updates.refuse(optimizer, optimizer.choices(keep_tensors=True))
        except RuntimeError:
            return True  # and raises when it runs
        return False

    @lower.constant_in_graphs
    def prepare(self, present: tuple[bool, ...]) -> tuple[Any, ...]:
        """Makes what is missing for a graph in which these parameters have a gradient.

        Returns:
            The number of its `Layout`; rows, columns and dtype of its table; the names of the scalars; its parts.
        """
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        declaration = optimizer.declaration
        members = [i for i, yes in enumerate(present) if yes]
        switches = _switches(optimizer)
        for i in members:
            self._make(i, declaration.switch_type(*switches[self._groups[i]]))
        self._know()
        lower.mark_static([*self.params, *(t for tensors in self.state.values() for t in tensors if t is not None)])
        uniform, counts = self._uniform(), self._next_counts()
        rows: dict[tuple[int, int], int] = {}
        row_of: list[int] = []
        firsts: dict[int, int] = {}
        parts: dict[Any, list[tuple[int, int]]] = {}
        names: tuple[str, ...] = ()
        for i in members:
            g, p = self._groups[i], self.params[i]
            buffers = declaration.kept(declaration.switch_type(*switches[g]))
            hyper, width = None, torch.float64
            if groups[g].get("capturable"):
                hyper = _sources(declaration, groups[g], self.hyper)
            else:
                width = arithmetic_dtype(p.dtype).to_real()
                names = names or tuple(evaluate(type(optimizer), declaration.choose(groups[g]).hyper, counts[i])[0])
            first = -1 if hyper is not None else firsts.setdefault(g, i) if uniform[g] else i
            row_of.append(rows.setdefault((g, first), len(rows)))
            dtypes = tuple(tensors[i].dtype for name, tensors in self.state.items() if name in buffers)
            parts.setdefault((p.device, p.dtype, dtypes, width, switches[g], buffers, hyper), []).append((i, row_of[-1]))
        layout = Layout(tuple(rows), tuple(members), tuple(row_of))
        if layout not in _numbers:
            _numbers[layout] = len(_layouts)
            _layouts.append(layout)
        lists = [Part(*zip(*pairs, strict=True), *key[3:]) for key, pairs in parts.items()]
        columns = max(len(names), *(len(part.hyper or ()) for part in lists))
        widths = {part.width for part in lists}
        dtype = widths.pop() if len(widths) == 1 else torch.float64
        return _numbers[layout], len(rows), columns, dtype, names, tuple(map(tuple, lists))

    def _make(self, i: int, on: Any) -> None:
        """Makes the state that a parameter lacks, without giving it to the optimizer."""
        optimizer, p = self.optimizer, self.params[i]
        made = optimizer.make_state(p, optimizer.param_groups[self._groups[i]], on)
        made = {name: value for name, value in made.items() if self.state[name][i] is None}
        for name, value in made.items():
            if name in self._counts and value.device.type == "cpu":
                self._counts[name][i] = value
                made[name] = self._counts[name].unbind()[i]
            self.state[name][i] = made[name]
        if made:
            self._made[i] = made

    def count(self, layout: Layout, columns: int, dtype: torch.dtype) -> Tensor:
        """The table of a step, ``[rows, columns]``; counts the step."""
        optimizer = self.optimizer
        algorithm, choose = type(optimizer), optimizer.declaration.choose
        choices = [choose(group, keep_tensors=bool(group.get("capturable"))) for group in optimizer.param_groups]
        counts = self._next_counts()
        table, afters = [], []
        for group, i in layout.rows:
            hyper = choices[group].hyper
            values, after = evaluate(algorithm, hyper, counts[i]) if i >= 0 else (hyper._asdict(), ())
            row = [float(v) if isinstance(v, Real) else 0.0 for v in values.values()]
            table.append(row + [0.0] * (columns - len(row)))
            afters.append(after)
        if self._made:
            self._give(layout.members)
        names = list(self._counts)
        if names:
            counted = [(i, row) for i, row in zip(layout.members, layout.row_of, strict=True) if layout.rows[row][1] >= 0]
            everything = len(counted) == len(self.params)
            positions = slice(None) if everything else torch.tensor([i for i, _ in counted])
            self._counts["step"][positions] += 1
            for j, name in enumerate(names[1:]):
                self._counts[name][positions] = torch.tensor([afters[row][j] for _, row in counted], dtype=torch.float64)
        optimizer._stepped()
        return torch.tensor(table, dtype=dtype)

    def _give(self, members: tuple[int, ...]) -> None:
        for i in members:
            if i in self._made:
                self.optimizer.state[self.params[i]].update(self._made.pop(i))
        self._entries = _entries(self.optimizer)


def _entries(optimizer: Optimizer) -> list[Any]:
    """Whatever is in the state of all parameters."""
    return [*itertools.chain.from_iterable(map(dict.values, optimizer.state.values()))]


def _switches(optimizer: Optimizer) -> tuple[tuple[bool, ...], ...]:
    """Of each param group; a number that is a tensor is on, for its device may have to be waited for."""
    names = optimizer.declaration.switch_type._fields
    groups = [[group[name] for name in names] for group in optimizer.param_groups]
    return tuple(tuple(isinstance(v, Tensor) or bool(v) for v in values) for values in groups)


def _refusal(optimizer: Optimizer) -> str:
    """Why a step of this optimizer is an operator although it is not compiled, or an empty string."""
    if not optimizer.accepts_dense:
        return "sparse gradients"
    if lower.step_has_hooks(optimizer):
        return "hooks"
    attributes = vars(optimizer)
    if attributes.get("grad_scale") is not None or attributes.get("found_inf") is not None:
        return "scaled gradients"
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if len(set(map(id, params))) < len(params):
        return "a parameter listed twice"
    return "" if set(map(type, params)) <= _PLAIN else "a tensor subclass"


def _sources(declaration: Declaration, group: dict[str, Any], hyper: list[Tensor]) -> tuple[tuple[str, Any], ...]:
    """Where a graph finds the hyperparameters of a capturable group, by name.

    Of a tensor its place in ``hyper``, as an int; of another number its column in the table, in a tuple; and the value
    of an option, in a tuple of two.
    """
    places, sources = {id(t): i for i, t in enumerate(hyper)}, []
    names = iter(declaration.hyper_type._fields)
    for option, field in declaration.options.items():
        value = group[option]
        for part in value if isinstance(field.default, tuple) else (value,):
            column = (len(sources),) if isinstance(field, Number) else (len(sources), part)
            sources.append((next(names), places.get(id(part), column)))
    return tuple(sources)


def _table(
    handle: Any, token: Tensor, hyper: Any, layout: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="cpu")


@operator(_table, "token", "hyper")
def count(
    handle: Handle, token: Tensor, hyper: list[Tensor], layout: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    inputs = handle.owner()._inputs  # type: ignore[union-attr]
    return inputs.run(lambda: inputs.count(_layouts[layout], columns, dtype), (hyper, inputs.hyper))  # type: ignore[no-any-return]


def trace(optimizer: Optimizer, inputs: RuleInputs) -> None:
    """The step; traced by Dynamo."""
    present = tuple([p.grad is not None for p in inputs.params])
    if not any(present):
        return
    layout, rows, columns, dtype, names, parts = inputs.prepare(present)
    table = torch.ops.compiled_optim.count(inputs.id, TOKEN, inputs.hyper, layout, rows, columns, dtype)
    for members, row_of, width, switches, buffers, hyper in parts:
        params = [inputs.params[i] for i in members]
        grads = [inputs.params[i].grad for i in members]
        state = {name: [inputs.state[name][i] for i in members] for name in buffers}
        on = Namespace(dict(zip(optimizer.declaration.switch_type._fields, switches)))  # noqa: B905
        cells = [row.unbind() for row in table.to(params[0].device, width).unbind()]
        if hyper is None:
            scalars = {name: [cells[row][j] for row in row_of] for j, name in enumerate(names)}
        else:
            scalars = _scalars_on_device(optimizer, inputs, members, cells[row_of[0]], hyper)
        eager.update_lists(type(optimizer), on, params, grads, state, scalars)


def _scalars_on_device(
    optimizer: Optimizer, inputs: RuleInputs, members: tuple[int, ...], row: Any, sources: Any
) -> dict[str, list[Any]]:
    """Those of a capturable group, from step counts on the device; traced by Dynamo."""
    values: dict[str, Any] = {}
    for name, source in sources:
        if isinstance(source, int):
            values[name] = inputs.hyper[source].reshape(())
        else:
            values[name] = source[1] if len(source) == 2 else row[source[0]]
    h = Namespace(values)
    algorithm, counts = type(optimizer), optimizer.declaration.counts
    updates = []
    for i in members:
        state = {name: inputs.state[name][i] for name in counts}
        updates.append(Update(0, inputs.params[i], inputs.params[i], state, (), counts, False))
    found = eager.on_device(updates, lambda group, counts: evaluate(algorithm, h, counts))
    return {k: v.tensors if isinstance(v, TensorList) else [v] * len(members) for k, v in found.items()}
