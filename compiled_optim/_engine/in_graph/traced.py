"""The update rule traced into the user's graph, as lists of tensors: a step that is not compiled by itself.

An operator before it counts the step and returns what ``scalars`` makes of the hyperparameters, in float64 on the host
as everywhere; so no value of theirs is in the graph, and nothing is computed per element that could be per step.
Where ``capturable``, the operator returns the hyperparameters only, and step counts are read on their device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_optim._engine.executions import checks, survey
from compiled_optim._engine.executions.checks import PLAIN
from compiled_optim._engine.executions.memory import Memory
from compiled_optim._engine.executions.state import count_tensor, make_state
from compiled_optim._engine.executions.survey import Member, Values
from compiled_optim._engine.executions.traced_lists import ScalarTable, arrange, numbers_of, update_parts
from compiled_optim._engine.in_graph.counts import HostCounts
from compiled_optim._engine.in_graph.handles import TOKEN, Handle, LiveInputs, operator, same
from compiled_optim._engine.rule import evaluate, first_scalars
from compiled_optim._engine.torch_private import dynamo


class Layout(NamedTuple):
    """What the operator has to know of a graph. Graphs name it by number, the same for all optimizers.

    ``members``: the parameters that are updated, by position; ``counted``: those whose steps the host counts, and
    ``row_of`` each of these.
    """

    table: ScalarTable
    members: tuple[int, ...]
    counted: tuple[int, ...]
    row_of: tuple[int, ...]


_numbers: dict[Layout, int] = {}
_layouts: list[Layout] = []


class TracedState(LiveInputs):
    """The inputs of an optimizer that is not compiled: its state is among them.

    ``states`` are the dicts of the optimizer's own state, in the order of the parameters. State that does not exist yet
    is made when a graph is traced, and becomes the optimizer's when that runs. Until then `_made` lists it.
    """

    def __init__(self, optimizer: Any) -> None:
        self.states: list[dict[str, Any]] = []
        self._counts = HostCounts((), torch.float32, [], [])
        self._groups: list[int] = []  # of each parameter
        self._left: list[list[Any]] = []  # the last snapshot
        self._made: set[int] = set()
        self._cannot = ""
        self._memory = Memory()
        self._share_memory = False
        super().__init__(optimizer)

    def refresh(self) -> bool:
        optimizer = self.optimizer
        changed = super().refresh()
        shared, self._share_memory = self._share_memory, self._look_for_shared_memory(optimizer)
        if changed or shared != self._share_memory or not all(map(same, self._snapshot(optimizer), self._left)):
            had = set() if changed else self._counts.placed
            self._gather(optimizer)
            self._make(had, _switches(optimizer))  # graphs take in this state, so what was removed is made again
        return changed

    def _look_for_shared_memory(self, optimizer: Any) -> bool:
        states = [optimizer.state.get(p, {}).values() for p in self.params]
        written = [[p, *[v for v in s if isinstance(v, Tensor)]] for p, s in zip(self.params, states, strict=True)]
        read = [p.grad for p in self.params]
        return any(self._memory.turns(written, [TOKEN if g is None else g for g in read]))

    def _snapshot(self, optimizer: Any) -> list[list[Any]]:
        """The dicts of the state and a few of their values, which change whenever somebody replaces or empties one."""
        live = [*optimizer.state.values()]
        names = optimizer.rule.declaration.counts or optimizer.rule.declaration.buffers
        return [live, *([state.get(name) for state in live] for name in names)]

    def _gather(self, optimizer: Any) -> None:
        groups, params = optimizer.param_groups, self.params
        self._groups = [i for i, group in enumerate(groups) for _ in group["params"]]
        self.states = [optimizer.state.get(p) or {} for p in params]
        self._made = set()
        on_host = [i for i, g in enumerate(self._groups) if not groups[g].get("capturable")]
        names = optimizer.rule.declaration.counts if on_host else ()
        dtype = count_tensor(torch.empty((), device="cpu"), {}, 0.0).dtype
        self._counts = HostCounts(names, dtype, self._groups, self.states)
        self._cannot = "" if set(map(type, params)) <= set(PLAIN) else "a tensor subclass"
        if optimizer.rule.matrices_only:
            self._cannot = "a `batched` function of numbers, which are tensors in a graph"
        if self._share_memory:  # or a parameter is listed twice
            self._cannot = "tensors that share memory"
            return
        for i in on_host:
            if self.states[i] and all(self.states[i].get(name) is not None for name in names):
                self._counts.adopt(i)

    def guarded(self) -> list[Any]:
        guarded, optimizer = super().guarded(), self.optimizer
        switches = _switches(optimizer)
        if not any(self.states):
            # It may be the graph of another instance, which takes in the state of all trained parameters.
            self._make([i for i, p in enumerate(self.params) if p.requires_grad], switches)
        capturable = [bool(group.get("capturable")) for group in optimizer.param_groups]
        return [*guarded, self._cannot, switches, capturable, self._counts.are_equal()]

    def _make(self, positions: Iterable[int], switches: list[tuple[bool, ...]]) -> None:
        """Makes the state that these parameters lack."""
        work = self.optimizer._work()
        declaration = work.rule.declaration
        for i in () if self._share_memory else positions:
            group, state = self._groups[i], self.states[i]
            made = make_state(work, self.params[i], work.groups[group], declaration.switch_type(*switches[group]))
            made = {name: value for name, value in made.items() if state.get(name) is None}
            if made and not state:
                self._made.add(i)
            state.update(made)
            if declaration.buffers.keys() & made:
                self._counts.fresh.add(i)
            if made and not work.groups[group].get("capturable"):
                self._counts.adopt(i)
        self._left = self._snapshot(self.optimizer)

    @dynamo.constant_in_graphs
    def refuses(self) -> bool:
        """Whether this step cannot be traced and has to be an operator."""
        optimizer = self.optimizer
        work = optimizer._work()
        sparse = not optimizer.accepts_dense or any(p.grad is not None and p.grad.is_sparse for p in self.params)
        if sparse or self._cannot:
            return True
        choices, declaration = work.read(keep_tensors=True), optimizer.rule.declaration
        try:
            survey.look(work, choices)
            for choice in choices:
                first_scalars(optimizer.rule, choice.hyper)
            for p, group, state in zip(self.params, self._groups, self.states, strict=True):
                for name in declaration.kept(choices[group].switches, p.dtype, p.dim()):
                    if state.get(name) is not None:
                        checks.check_buffer(work, p, name, state[name], declaration.shape_of(name, p.shape))
        except Exception:
            return True  # the operator raises when it runs, if the error still holds then
        return False

    @dynamo.constant_in_graphs
    def prepare(self, present: tuple[bool, ...]) -> tuple[Any, ...]:
        """Makes what is missing for a graph in which these parameters have a gradient.

        Returns:
            The number of its `Layout`; rows, columns and dtype of its table; its parts.
        """
        work, switches = self.optimizer._work(), _switches(self.optimizer)
        declaration = work.rule.declaration
        members = [i for i, yes in enumerate(present) if yes]
        self._make(members, switches)
        updates = {}
        for i in members:
            g, p, state = self._groups[i], self.params[i], self.states[i]
            buffers = declaration.kept(declaration.switch_type(*switches[g]), p.dtype, p.dim())
            kind = (g, p.device, p.dtype, *[state[name].dtype for name in buffers])
            updates[i] = Member(g, p, p, None, state, buffers, declaration.counts, kind=kind)
        dynamo.mark_static([*self.params, *(u.state[name] for u in updates.values() for name in u.buffers)])

        def scalar_names(i: int) -> Iterable[str]:
            h = declaration.read(work.groups[self._groups[i]]).hyper
            return evaluate(work.rule, h, self._counts.next(i))[0]

        table, parts = arrange(work, updates, switches, self._counts.are_equal(), self.hyper, scalar_names)
        on_host = [part for part in parts if part.sources is None]
        counted = sorted(pair for part in on_host for pair in zip(part.members, part.rows, strict=True))
        layout = Layout(table, tuple(members), *(zip(*counted, strict=True) if counted else ((), ())))
        if layout not in _numbers:
            _numbers[layout] = len(_layouts)
            _layouts.append(layout)
        return _numbers[layout], len(table.rows), table.columns, table.dtype, tuple(map(tuple, parts))

    def count(self, layout: Layout) -> Tensor:
        """The table of a step, ``[rows, columns]``; counts the step."""
        optimizer = self.optimizer
        optimizer._check_schedule()
        rule, choose = optimizer.rule, optimizer.rule.declaration.read
        choices = [choose(group, keep_tensors=bool(group.get("capturable"))) for group in optimizer.param_groups]
        evaluated: list[Values] = []
        for group, i in layout.table.rows:
            hyper = choices[group].hyper
            evaluated.append(evaluate(rule, hyper, self._counts.next(i)) if i >= 0 else (numbers_of(hyper), ()))
        table = layout.table.fill([values for values, _ in evaluated])
        carried = [evaluated[row][1] for row in layout.row_of] if optimizer.rule.declaration.carried else ()
        self._counts.advance(layout.counted, carried)
        if self._made:
            self._publish_state(optimizer, layout.members)
        optimizer._stepped()
        return table

    def trace(self) -> bool:
        """The step, if there is any gradient. Dynamo traces this method."""
        return trace(self.optimizer, self)

    def _publish_state(self, optimizer: Any, members: tuple[int, ...]) -> None:
        """Gives the optimizer the state that was made for it."""
        for i in self._made.intersection(members):
            optimizer.state[self.params[i]] = self.states[i]
        self._made.difference_update(members)
        self._left = self._snapshot(optimizer)


def _switches(optimizer: Any) -> list[tuple[bool, ...]]:
    """Switches per param group. A tensor counts as on, because reading it could block on its device."""
    names = optimizer.rule.declaration.switch_type._fields
    groups = optimizer.param_groups
    return [tuple([isinstance(v, Tensor) or bool(v) for v in map(group.__getitem__, names)]) for group in groups]


def _table(handle: Any, token: Tensor, hyper: Any, layout: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="cpu")


@operator(_table, "token", "hyper")
def count(
    handle: Handle, token: Tensor, hyper: list[Tensor], layout: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    inputs = handle.owner()._inputs  # type: ignore[union-attr]
    return inputs.run(lambda: inputs.count(_layouts[layout]), (hyper, inputs.hyper))  # type: ignore[no-any-return]


def trace(optimizer: Any, inputs: TracedState) -> bool:
    """The step, if there is any gradient. Dynamo traces this function."""
    present = tuple([p.grad is not None for p in inputs.params])
    if not any(present):
        return False
    number, rows, columns, dtype, parts = inputs.prepare(present)
    table = torch.ops.compiled_optim.count(inputs.id, TOKEN, inputs.hyper, number, rows, columns, dtype)
    params, states = inputs.params, inputs.states
    tensors = []
    for members, _, _, _, buffers, _, sources in parts:
        state = {name: [states[i][name] for i in members] for name in buffers}
        counts = [
            [states[i][name] for i in members] for name in optimizer.rule.declaration.counts if sources is not None
        ]
        tensors.append(([params[i] for i in members], [params[i].grad for i in members], state, counts))
    update_parts(optimizer.rule, parts, tensors, table, inputs.hyper)
    return True
