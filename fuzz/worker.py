"""Episodes: an optimizer is made, changed and stepped some twenty times; each is reproduced by its number alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from . import changes, tensors
from .known import ODD_ERRORS, Finding
from .subjects import Average, Closure, Subject, subject

STEPS = 20  # of an episode, at most


@dataclass
class Settings:
    seed: int
    algorithms: list[str]
    dtypes: list[str]
    mild: bool


class Episode:
    """``steps``: how many were taken, ``compared``: of those, with torch's; ``doing``: what was done last."""

    def __init__(self, settings: Settings, number: int, tell: Callable[[Episode], None]) -> None:
        self.settings, self.number, self.tell = settings, number, tell
        self.random = Random(f"{settings.seed} {number}")
        torch.manual_seed(self.random.randrange(2**31))
        self.steps = self.compared = 0
        self.doing: list[str] = []
        self.name = ""

    def run(self) -> Iterator[Finding]:
        """Steps, and calls ``tell`` before each, for whoever finds the process dead; yields what is wrong."""
        self.name = self.random.choice(self.settings.algorithms)
        s = subject(self.name, self.random, [getattr(torch, d) for d in self.settings.dtypes])
        for _ in range(STEPS):
            self.doing = []
            yield from self._change(s)
            s.new_gradients()
            self.steps += 1
            yield from self._step(s)
            if s.broken:
                return

    def _finding(self, kind: str, error: Any, **options: Any) -> Finding:
        message = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
        seed = f"{self.settings.seed} --episode {self.number} (step {self.steps})"
        return Finding(kind, self.name, seed, list(self.doing), message[:300], **options)

    def _change(self, s: Subject) -> Iterator[Finding]:
        usual, strange = changes.between(s, self.settings.mild)
        chosen = [self.random.choice(usual)] * (self.random.random() < 0.5)
        chosen += [self.random.choice(strange)] * (self.random.random() < 0.35)
        for change in chosen:
            self.doing.append(change.__name__)
            try:
                change(s)
            except changes.HalfLoadedError:
                yield self._finding("half load", "")
            except Exception as error:
                self.doing[-1] += f" ({type(error).__name__})"
                if change is changes.loaded_malformed and isinstance(error, ODD_ERRORS):
                    yield self._finding("odd error", error)

    def _step(self, s: Subject) -> Iterator[Finding]:
        during, hooks = self._intrude(s), []
        twin: Any = None
        stock_error: Exception | None = None
        if not during and not s.unsafe_for_torch():
            try:
                twin = s.twin()
            except Exception as error:
                stock_error = error
        if during == "hook":
            change = self.random.choice(changes.DURING)
            self.doing.append(f"hook: {change.__name__}")
            hooks = [s.optimizer.register_step_pre_hook(lambda *_: change(s))]
        before, raised = s.snapshot(), None
        self.tell(self)
        try:
            s.step()
        except Exception as error:
            raised = error
        changes.Intruder.change = None
        for hook in hooks:
            hook.remove()
        if twin is not None:
            try:
                twin[0]()
            except Exception as error:
                stock_error = error
        stock = "" if stock_error is None else f"{type(stock_error).__name__}: {stock_error}"[:200]
        if raised is not None:
            s.broken = True
            on_purpose = isinstance(raised, InterruptedError)
            if not during and not on_purpose and s.snapshot() != before:
                yield self._finding("half step", raised, stock=stock)
            alike = stock_error is not None and type(raised) is type(stock_error)
            if isinstance(raised, ODD_ERRORS) and not during and not alike:
                yield self._finding("odd error", raised, stock=stock)
            if twin is not None and not stock:
                yield self._finding("ours raises", raised)
            if not on_purpose:
                return
        elif twin is not None and stock:
            s.broken = True
            yield self._finding("torch raises", "", stock=stock)
            return
        if twin is not None:
            self.compared += 1
            for name, ours, theirs in twin[1]():
                if differs := tensors.difference(ours, theirs, s.looser):
                    s.broken = True
                    yield self._finding("value", f"{name}: {differs}")
                    return
        if not all(torch.isfinite(tensors.plain(p)).all() for p in s.params if self._dense(p)):
            s.broken = True

    @staticmethod
    def _dense(p: Any) -> bool:
        return p.layout is torch.strided and p.device.type == "cpu" and tensors.in_memory(tensors.plain(p))

    def _intrude(self, s: Subject) -> str:
        """Has a hook or a gradient change something during the step; which of them, or an empty string."""
        draw = self.random.random()
        if isinstance(s, Average | Closure) or s.broken or draw > 0.1:
            return ""
        if draw < 0.05:
            return "hook"
        p, change = self.random.choice(s.params), self.random.choice(changes.DURING)
        with contextlib.suppress(RuntimeError, TypeError):
            p.grad = tensors.values(self.random, tuple(p.shape), p.dtype).as_subclass(changes.Intruder)
            self.doing.append(f"gradient: {change.__name__}")

            def quietly() -> None:
                with contextlib.suppress(Exception):
                    change(s)

            changes.Intruder.change = quietly
        return "gradient"
