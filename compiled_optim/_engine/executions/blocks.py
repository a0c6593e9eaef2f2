"""Steps taken during the backward pass: each block of parameters as soon as its gradients are there."""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from compiled_optim._engine.executions.dispatch import Execution
from compiled_optim._engine.executions.norms import combined
from compiled_optim._engine.executions.scaling import Scaling
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.one_pass import OnePass
from compiled_optim._engine.rule import Rule
from compiled_optim._engine.torch_private.backward import at_its_end, backward_pass
from compiled_optim._engine.torch_private.dynamo import skipped
from compiled_optim._engine.torch_private.streams import raw_stream


@dataclass(slots=True, eq=False)
class Place:
    """A parameter of the optimizer.

    Attributes:
        groups: the indices of its param groups; more than one if it is listed more than once.
        elements: at least 1, so that waiting elements are 0 only if no gradient waits.
        count: how often its gradient was accumulated in this iteration.
        has_arrived: whether its gradient is complete and waits for the update.
        hook: registered on it, unless it is left to ``step()`` or frozen.
    """

    param: Tensor
    groups: list[int]
    elements: int
    count: int = 0
    has_arrived: bool = False
    block: Block | None = None
    hook: RemovableHandle | None = None


class Lane:
    """A device, or one of its streams, on which gradients are accumulated.

    An update that is launched there needs no synchronisation with them, so a block lies in one lane.

    Attributes:
        open: the block to which parameters without one are added.
        waiting: how many elements of gradients wait for their update.
    """

    def __init__(self, key: Any) -> None:
        self.key = key
        self.open: Block | None = None
        self.waiting = 0


class Block:
    """Parameters that are updated together, by an execution that has only these."""

    def __init__(self, lane: Lane, execution: Execution) -> None:
        self.lane, self.execution = lane, execution
        self.take([])

    def take(self, places: list[Place]) -> None:
        """Replaces the places of the block."""
        self.places: list[Place] = []
        self.elements = 0
        self.arrived = 0  # how many places
        self._params: dict[int, list[Tensor]] = defaultdict(list)  # by param group
        for place in places:
            self.add(place)

    def add(self, place: Place) -> None:
        place.block = self
        self.places.append(place)
        self.elements += place.elements
        self.arrived += place.has_arrived
        for i in place.groups:
            self._params[i].append(place.param)

    def work_of(self, whole: Work) -> Work:
        """The part of the optimizer's work that concerns the block. Options are read anew, state is shared."""
        groups = [{**whole.groups[i], "params": params} for i, params in self._params.items()]
        work = self.execution.work_on(groups, _State(whole.state, self.places), whole.defaults)
        work.listed_in = whole.groups
        return work


class _State(dict[Tensor, dict[str, Any]]):
    """The state of some of an optimizer's parameters. Entries are made and deleted in the optimizer's state too."""

    def __init__(self, whole: Any, places: list[Place]) -> None:
        super().__init__({p: whole[p] for place in places if (p := place.param) in whole})
        self._whole = whole

    def __missing__(self, p: Tensor) -> dict[str, Any]:
        inner = self[p] = self._whole[p]
        return inner  # type: ignore[no-any-return]

    def __delitem__(self, p: Tensor) -> None:
        super().__delitem__(p)
        del self._whole[p]


class Blocks(Execution):
    """The execution of an optimizer that steps during the backward pass.

    Blocks are made in the order in which gradients arrive, and are kept: a block is updated when all of its parameters
    have their gradients, and then frees these. If too many elements wait for others, which happens when gradients
    arrive in another order or not at all, blocks are split into what has arrived and what has not.

    Args:
        begin: called at the first gradient of each backward pass; returns what there is to step on, or None if the
            optimizer is gone.
        chosen: returns the identities of the parameters to update during the backward pass, or None for all.
        micro_steps: how often the gradient of a parameter is accumulated before it is complete.
        elements: a block has at least so many, except the last. About twice as many wait at most.
        clips: whether gradients may be clipped. That is by the last finite norm of the gradients of an iteration; in
            the first one by the norm of those that have been used so far.
    """

    in_backward = True

    def __init__(
        self,
        rule: Rule,
        compiled: bool | str,
        begin: Callable[[], Work | None],
        chosen: Callable[[], set[int] | None],
        micro_steps: int,
        elements: int,
        clips: bool,
    ) -> None:
        self._places: dict[int, Place] = {}  # by the identity of the parameter
        super().__init__(rule, compiled)
        self._clips = clips
        self._one_pass: OnePass | None = None
        self._norms: list[float | Tensor] = []  # of the gradients that were used in this iteration
        self._norm_before: float | None = None
        self._begin, self._chosen, self._micro_steps, self._elements = begin, chosen, micro_steps, elements
        self._lock = threading.RLock()  # the backward pass has a thread for each device
        self._pass = -1
        self._listed: list[list[int]] = []  # the identities of the parameters, by param group
        self._without_hook: list[Place] = []
        self._lanes: dict[Any, Lane] = {}

    @property
    def parts(self) -> list[Execution]:
        return [block.execution for block in self._blocks()]

    def _blocks(self) -> Iterable[Block]:
        return dict.fromkeys(place.block for place in self._places.values() if place.block is not None)

    def follow(self, work: Work) -> None:
        """Follows changes of the param groups: takes parameters that are new, and registers hooks where they lack."""
        listed = [[*map(id, group["params"])] for group in work.groups]
        if listed != self._listed:
            self._listed = listed
            self._take_places(work)
        if self._without_hook:
            hook = functools.partial(_accumulated, weakref.ref(self))
            for place in self._without_hook:
                p: Any = place.param  # whose method is not annotated
                if p.requires_grad:
                    place.hook = p.register_post_accumulate_grad_hook(hook)
            self._without_hook = [place for place in self._without_hook if place.hook is None]

    def _take_places(self, work: Work) -> None:
        before, self._places, self._lanes = self._places, {}, {}
        for i, group in enumerate(work.groups):
            for p in group["params"]:
                place = self._places.setdefault(id(p), Place(p, [], max(1, p.numel())))
                place.groups.append(i)
        for key, place in before.items():
            if key in self._places:
                # a gradient that waited, because a backward pass raised, counts again when it arrives
                self._places[key].count, self._places[key].hook = place.count - place.has_arrived, place.hook
            elif place.hook is not None:
                place.hook.remove()
        chosen = self._chosen()
        self._without_hook = [
            place for key, place in self._places.items() if place.hook is None and (chosen is None or key in chosen)
        ]

    def remove_hooks(self) -> None:
        for place in self._places.values():
            if place.hook is not None:
                place.hook.remove()

    __del__ = remove_hooks

    def accumulated(self, p: Tensor) -> None:
        """Called after each accumulation. Updates the block of the parameter if all of its gradients are complete."""
        with self._lock:
            current = backward_pass()
            if current != self._pass or current < 0:
                work = self._begin()
                if work is None:
                    return
                self.follow(work)
                self._pass = current
                if current >= 0:
                    at_its_end(functools.partial(_ended, weakref.ref(self)))
            place = self._places.get(id(p))
            if place is None:
                return
            place.count += 1
            if place.count > self._micro_steps:
                raise RuntimeError(
                    f"micro_steps must be how often a gradient is accumulated before step(), got {self._micro_steps}, "
                    f"and that of a parameter of shape {tuple(p.shape)} was accumulated {place.count} times since the "
                    "last step() or zero_grad()"
                )
            if place.count < self._micro_steps:
                return
            block = self._arrive(place)
            lane = block.lane
            if block.arrived == len(block.places) and (lane.open is not block or block.elements >= self._elements):
                self._update(block)
            elif lane.waiting >= 2 * self._elements or current < 0:
                self._update_all(lane)

    def ended(self) -> None:
        """Called at the end of a backward pass. Updates the parameters whose gradients still wait."""
        with self._lock:
            self._update_all()

    def surround(self, work: Work, one_pass: OnePass | None, scaling: Scaling | None) -> bool:
        if scaling is not None:
            raise RuntimeError(
                "step_in_backward does not support a GradScaler: gradients are used before it can say whether one of "
                "them overflowed. Remove it, or train in bfloat16, which needs no scaler"
            )
        if one_pass is not None and one_pass.skip_nonfinite:
            raise ValueError("step_in_backward does not support skip_nonfinite=True: it depends on all gradients")
        if one_pass is not None and one_pass.max_grad_norm is not None and not self._clips:
            raise ValueError(
                f"step_in_backward does not support max_grad_norm={one_pass.max_grad_norm!r}, for which all gradients "
                "must be there, unless by norm='previous', the norm of the iteration before"
            )
        self._one_pass = one_pass
        return True

    def step(self, work: Work) -> None:
        """Updates the parameters that still have a gradient, which stays. The next iteration begins."""
        with self._lock:
            self.follow(work)
            left = [place for place in self._places.values() if place.param.grad is not None]
            for place in left:
                if place.count == self._micro_steps and not place.has_arrived:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(place.param.shape)} has another gradient after its update in the "
                        "backward pass, as DistributedDataParallel sets: step_in_backward does not support that"
                    )
            for place in left:
                self._arrive(place)
            self._update_all(free=False)
            if self._norms and self._one_pass is not None:
                self._one_pass.norm = norm = float(combined(self._norms, self._one_pass.norm_type))
                self._norm_before = norm if math.isfinite(norm) else self._norm_before
            self.restart()

    def restart(self) -> None:
        with self._lock:
            for place in self._places.values():
                place.count, place.has_arrived = 0, False
            self._norms = []
            for block in self._blocks():
                block.arrived = block.lane.waiting = 0

    def _arrive(self, place: Place) -> Block:
        p, block = place.param, place.block
        key = (p.device, raw_stream(p.device.index)) if p.is_cuda else p.device
        if block is not None and block.lane.key != key:
            block.take([other for other in block.places if other is not place])
            block = None
        if block is None:
            lane = self._lanes.get(key) or self._lanes.setdefault(key, Lane(key))
            block = lane.open = lane.open or Block(lane, self.sibling())
            block.add(place)
        if not place.has_arrived:
            place.has_arrived = True
            block.arrived += 1
            block.lane.waiting += place.elements
        return block

    def _update_all(self, lane: Lane | None = None, *, free: bool = True) -> None:
        if not any(each.waiting for each in self._lanes.values()):
            return
        for block in self._blocks():
            if block.arrived and lane in (None, block.lane):
                self._update(block if block.arrived == len(block.places) else self._split(block), free=free)

    def _split(self, block: Block) -> Block:
        """Moves the places that have arrived to a block of their own."""
        places, arrived = block.places, Block(block.lane, self.sibling())
        block.take([place for place in places if not place.has_arrived])
        arrived.take([place for place in places if place.has_arrived])
        return arrived

    def _update(self, block: Block, *, free: bool = True) -> None:
        lane = block.lane
        if lane.open is block:
            lane.open = None
        work = block.work_of(self._work)
        block.execution.surround(work, self._one_pass, None)
        norms = self._clip(work)
        block.execution.step(work)
        self._norms = norms
        lane.waiting -= block.elements
        block.arrived = 0
        for place in block.places:
            place.has_arrived = False
            if free:
                place.param.grad = None

    def _clip(self, work: Work) -> list[float | Tensor]:
        """Replaces the factor that `surround` took from the norm of the block alone. Returns the norms so far."""
        one_pass = self._one_pass
        if one_pass is None or one_pass.max_grad_norm is None or one_pass.norm is None:
            return []
        norms, by = [*self._norms, one_pass.norm], self._norm_before
        one_pass.norm = None  # the next block would write its norm into this tensor
        work.given = one_pass.given(
            one_pass.factor(float(combined(norms, one_pass.norm_type)) if by is None else by, 1)
        )
        return norms


# A compiled function that calls backward() would otherwise compile what its hooks call.
@skipped
def _accumulated(reference: weakref.ref[Blocks], p: Tensor) -> None:
    blocks = reference()
    if blocks is not None:
        blocks.accumulated(p)


@skipped
def _ended(reference: weakref.ref[Blocks]) -> None:
    blocks = reference()
    if blocks is not None:
        blocks.ended()
