"""What is stepped: an optimizer, LBFGS with its closure, or an average; and torch's, made of copies of all it holds."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.optim import swa_utils as stock_averages

import compiled_optim
from compiled_optim import swa_utils

from . import tensors
from .tensors import Copies, content

# by name: the class, and options which a group has from the start
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "Momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "AdamW": ("AdamW", {"lr": 0.01}),
    "Adagrad": ("Adagrad", {"lr": 0.1}),
    "Adam": ("Adam", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "RMSprop": ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "NAdam": ("NAdam", {"lr": 0.01}),
    "RAdam": ("RAdam", {"lr": 0.01}),
    "Rprop": ("Rprop", {"lr": 0.01}),
    "ASGD": ("ASGD", {"lr": 0.01}),
    "Adamax": ("Adamax", {"lr": 0.01}),
    "Adadelta": ("Adadelta", {"lr": 0.1}),
    "SparseAdam": ("SparseAdam", {"lr": 0.01}),
    "Adafactor": ("Adafactor", {"lr": 0.1, "weight_decay": 0.1, "eps": (1e-6, 1e-3)}),
    "Muon": ("Muon", {"lr": 0.1}),
    "LBFGS": ("LBFGS", {"lr": 0.3, "max_iter": 3, "history_size": 3}),
    "Average": ("Average", {}),
}
Twin = tuple[Callable[[], Any], Callable[[], Iterator[tuple[str, Tensor, Tensor]]]]


class Subject:
    """An optimizer of ours and its parameters."""

    looser = 1.0  # factor on the tolerances
    broken = False  # whether it holds what no step should go on from

    def __init__(self, name: str, random: Random, dtypes: list[torch.dtype]) -> None:
        self.name, self.random, self.dtypes = name, random, dtypes
        self.class_name, self.options = ALGORITHMS[name]
        cls = getattr(compiled_optim, self.class_name, None)
        self.reduces = not getattr(cls, "elementwise", True)
        self.matrices_only = getattr(cls, "matrices_only", False)
        if self.matrices_only:  # products of bfloat16, which lists round in other places
            self.looser = 300.0
        if not getattr(cls, "accepts_complex", True):
            self.dtypes = [dtype for dtype in dtypes if not dtype.is_complex]
        self.params: list[Any] = [self.new_parameter() for _ in range(random.randint(1, 6))]
        if random.random() < 0.3:  # views of one storage
            base = torch.randn(40, dtype=random.choice(self.dtypes))
            base = base.view(20, 2) if self.matrices_only else base
            self.params += [torch.nn.Parameter(base[:17]), torch.nn.Parameter(base[17:])]
        self.compiled: Any = random.random() < 0.85
        self.optimizer: Any = self.build()

    def build(self) -> Any:
        cut = self.random.randint(0, len(self.params) - 1)
        groups = [{"params": self.params[:cut], "lr": 0.03}] * bool(cut) + [{"params": self.params[cut:]}]
        return getattr(compiled_optim, self.class_name)(groups, compiled=self.compiled, **self.options)

    def new_parameter(self) -> Any:
        shapes = [s for s in tensors.SHAPES if len(s) == 2 or not self.matrices_only]
        x = tensors.values(self.random, self.random.choice(shapes), self.random.choice(self.dtypes), 0)
        return torch.nn.Parameter(tensors.laid_out(x, self.random.choice(["plain", *tensors.OWN_MEMORY])))

    def new_gradients(self) -> None:
        random = self.random
        for p in self.params:
            draw = random.random()
            if draw < 0.9 and p.layout is torch.strided and p.device.type == "cpu":
                grad = tensors.values(random, tuple(p.shape), p.dtype)
                only_sparse = self.class_name == "SparseAdam" and draw < 0.85
                if (draw < 0.1 or only_sparse) and p.dim() and p.shape[0] and not p.is_complex():
                    grad = tensors.sparse(random, grad)
                else:
                    grad = tensors.laid_out(grad, random.choice(["plain"] * 5 + tensors.LAYOUTS))
                self._assign(p, grad)

    @staticmethod
    def _assign(p: Any, grad: Tensor) -> None:
        try:
            p.grad = grad
        except (RuntimeError, TypeError):  # torch does not allow it for this parameter
            p.grad = None

    def all_parameters(self) -> list[Any]:
        listed = [p for group in self.optimizer.param_groups for p in group["params"]]
        return list({id(p): p for p in [*self.params, *listed]}.values())

    def step(self) -> Any:
        return self.optimizer.step()

    def snapshot(self) -> Any:
        """All that a step which raises must leave as it is."""
        states = {id(p): s for p, s in self.optimizer.state.items() if s or not isinstance(s, dict)}
        state = {
            at: {k: content(v) for k, v in s.items()} if isinstance(s, dict) else repr(s) for at, s in states.items()
        }
        return [content(p) for p in self.all_parameters()], state

    def unsafe_for_torch(self) -> bool:
        """Whether torch's own loop would read or write memory that is not there.

        It does where the storage is too short, and where a sparse vector is added to a tensor that does not begin where
        its storage does: the offset is then counted twice.
        """
        params = self.all_parameters()
        held = [x for p in params for x in (p, p.grad) if x is not None]
        held += [v for s in self.optimizer.state.values() if isinstance(s, dict) for v in s.values()]
        strided = [x for x in held if isinstance(x, Tensor) and x.layout is torch.strided]
        sparse = any(p.grad is not None and p.grad.is_sparse for p in params)
        return (
            any(p.grad is not None and p.grad.shape != p.shape for p in params)
            or not all(tensors.in_memory(tensors.plain(x)) for x in strided)
            or (sparse and any(x.storage_offset() for x in strided))
        )

    def twin(self) -> Twin:
        """The step of torch's optimizer on copies of all, and what to compare after it: name, ours, theirs."""
        stock, made = self._copied(Copies(), {})

        def compare() -> Iterator[tuple[str, Tensor, Tensor]]:
            for p, q in made.values():
                yield "parameter", p, q
                for name, theirs in stock.state.get(q, {}).items():
                    ours = self.optimizer.state.get(p, {}).get(name)
                    if isinstance(theirs, Tensor):
                        yield f"state {name!r}", ours if isinstance(ours, Tensor) else torch.empty(0), theirs

        return stock.step, compare

    def _copied(self, copies: Copies, made: dict[int, tuple[Any, Any]]) -> tuple[Any, dict[int, tuple[Any, Any]]]:
        def value(v: Any) -> Any:
            if isinstance(v, list):
                return [value(x) for x in v]
            return copies(v) if isinstance(v, Tensor) else copy.deepcopy(v)

        def parameter(p: Any) -> Any:
            if id(p) not in made:
                q = torch.nn.Parameter(copies(p.data), requires_grad=p.requires_grad)
                if p.grad is not None:
                    if p.grad.dtype != q.dtype:
                        q.grad_dtype = None
                    q.grad = copies(p.grad)
                made[id(p)] = (p, q)
            return made[id(p)][1]

        stock = getattr(torch.optim, self.class_name)([torch.nn.Parameter(torch.zeros(1, 1))], **self.options)
        groups = []
        for group in self.optimizer.param_groups:
            options = {
                k: copies(v) if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in group.items() if k != "params"
            }
            forced = {"foreach": False, "fused": None} if "foreach" in options else {}
            groups.append({**options, **forced, "params": [parameter(p) for p in group["params"]]})
        stock.param_groups = groups
        stock.state = defaultdict(dict)
        for p, state in self.state_of_torch().items():
            if isinstance(p, Tensor):
                held = {k: value(v) for k, v in state.items()} if isinstance(state, dict) else state
                stock.state[parameter(p)] = held
        return stock, made

    def state_of_torch(self) -> Any:
        return self.optimizer.state


class Closure(Subject):
    """LBFGS: a closure gives its gradients, at times sparse ones, and at times it raises."""

    looser = 1e3  # it solves ill-conditioned systems

    def build(self) -> Any:
        self.raises_at = self.sparse_at = -1
        self.options = {**self.options, "line_search_fn": self.random.choice([None, "strong_wolfe"])}
        return compiled_optim.LBFGS(self.params, compiled=self.compiled, **self.options)

    def new_gradients(self) -> None:
        self.raises_at = self.random.choice([-1] * 9 + [0, 1, 2, 4])
        self.sparse_at = self.random.choice([-1, -1, -1, 0, 2])

    def closure_of(self, params: list[Any]) -> Callable[[], float]:
        calls = 0

        def closure() -> float:
            nonlocal calls
            loss = 0.0
            for i, p in enumerate(params):
                x = tensors.plain(p)
                grad = 2 * (i + 1) * (x - 1)
                Subject._assign(p, grad.to_sparse(1) if calls == self.sparse_at and x.dim() and x.numel() else grad)
                loss += (i + 1) * float(((x - 1).abs().double() ** 2).sum())
            calls += 1
            if calls - 1 == self.raises_at:
                raise InterruptedError("the closure")
            return loss

        return closure

    def step(self) -> Any:
        return self.optimizer.step(self.closure_of(self.optimizer.param_groups[0]["params"]))

    def twin(self) -> Twin:
        stock, made = self._copied(Copies(), {})
        stock._params, stock._numel_cache = stock.param_groups[0]["params"], None
        closure = self.closure_of(stock._params)

        def compare() -> Iterator[tuple[str, Tensor, Tensor]]:
            for p, q in made.values():
                yield "parameter", p, q

        return (lambda: stock.step(closure)), compare

    def state_of_torch(self) -> Any:
        return self.optimizer._state_of_torch()

    def unsafe_for_torch(self) -> bool:
        for p in self.all_parameters():
            p.grad = None  # the closure gives new ones
        return super().unsafe_for_torch()


class Average(Subject):
    """An average of weights; its model is what changes."""

    def build(self) -> Any:
        self.model = torch.nn.Module()
        for i, p in enumerate(self.params):
            self.model.register_parameter(f"p{i}", p)
        self.model.register_buffer("count", torch.zeros(3))
        decay = self.random.choice([None, 0.0, 0.5, 0.99])
        self.options = {"use_buffers": self.random.random() < 0.5}
        if decay is not None:
            self.options["multi_avg_fn"] = swa_utils.get_ema_multi_avg_fn(decay)
        average: Any = swa_utils.AveragedModel(self.model, compiled=bool(self.compiled), **self.options)
        average.state, average.param_groups = {}, [{"params": self.params}]  # so that changes find what they change
        return average

    def new_gradients(self) -> None:
        for p in self.params:
            if self.random.random() < 0.8:
                p.data = tensors.values(self.random, tuple(p.shape), p.dtype)
        if self.random.random() < 0.2:
            q = self.random.choice(list(self.optimizer.module.parameters()))
            q.data = tensors.laid_out(q.data, self.random.choice(tensors.OWN_MEMORY)).detach()

    def step(self) -> Any:
        return self.optimizer.update_parameters(self.model)

    def all_parameters(self) -> list[Any]:
        return [*self.params, *self.optimizer.module.parameters()]

    def snapshot(self) -> Any:
        held = [*self.optimizer.module.parameters(), *self.optimizer.module.buffers(), self.optimizer.n_averaged]
        return [content(x) for x in [*self.params, *held]], {}

    def twin(self) -> Twin:
        copies = Copies()

        def module_of(module: torch.nn.Module) -> torch.nn.Module:
            twin = torch.nn.Module()
            for name, p in module.named_parameters():
                twin.register_parameter(name, torch.nn.Parameter(copies(p.data), requires_grad=p.requires_grad))
            for name, b in module.named_buffers():
                twin.register_buffer(name, copies(b))
            return twin

        model = module_of(self.model)
        stock = stock_averages.AveragedModel(torch.nn.Module(), **self.options)
        stock.module, stock.n_averaged = module_of(self.optimizer.module), copies(self.optimizer.n_averaged)

        def compare() -> Iterator[tuple[str, Tensor, Tensor]]:
            for kind in ("parameters", "buffers"):
                pairs = zip(getattr(self.optimizer, kind)(), getattr(stock, kind)(), strict=True)
                yield from ((kind, ours, theirs) for ours, theirs in pairs)

        return (lambda: stock.update_parameters(model)), compare


def subject(name: str, random: Random, dtypes: list[torch.dtype]) -> Subject:
    return {"LBFGS": Closure, "Average": Average}.get(name, Subject)(name, random, dtypes)
