"""Two devices that stand in for GPUs, so that whole steps run where there is none.

Tensors on ``DEVICES`` are torch's own and not on the CPU, but their memory is the host's: each operation runs on
aliases on the CPU. `no_waiting` makes what would block on a GPU raise, and `capture` records operations instead of
running them.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from compiled_optim._engine.cache import native
from compiled_optim._engine.kernels import registry
from compiled_optim._engine.torch_private import inductor

TYPE = "privateuseone"  # as torch names a device that it does not bring itself
DEVICES = (torch.device(TYPE, 0), torch.device(TYPE, 1))

aten = torch.ops.aten
_CPU, _SPARSE_CPU = map(torch._C.DispatchKeySet, (torch._C.DispatchKey.CPU, torch._C.DispatchKey.SparseCPU))
# What waits for a GPU because the host needs a value, or the number of elements of the result.
_WAITING = (
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.repeat_interleave,
    aten._coalesce,
)


class WaitError(RuntimeError):
    """The host would have waited for the device."""


class Graph:
    """What was recorded while a graph was captured."""

    def __init__(self) -> None:
        self.actions: list[Callable[[], Any]] = []
        self.memory: list[torch.Tensor] = []  # allocated meanwhile; a GPU's graph has a pool of its own

    def replay(self) -> None:
        for action in self.actions:
            action()


class _State:
    forbidden = False
    graph: Graph | None = None
    stream = 0  # the address of the current one; 0 is the default


_state = _State()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, what would make the host wait for a GPU raises WaitError."""
    before, _state.forbidden = _state.forbidden, True
    try:
        yield
    finally:
        _state.forbidden = before


@contextmanager
def capture() -> Iterator[Graph]:
    """Within it, as within ``torch.cuda.graph``, operations and launches on a device are recorded and do not run."""
    with no_waiting():
        _state.graph = graph = Graph()
        try:
            yield graph
        finally:
            _state.graph = None


def captured() -> Graph | None:
    """The graph that is captured now."""
    return _state.graph


@contextmanager
def on_stream(address: int) -> Iterator[None]:
    """Within it, this is the address of the current stream of all devices; that of the default stream is 0."""
    before, _state.stream = _state.stream, address
    try:
        yield
    finally:
        _state.stream = before


def stream() -> int:
    return _state.stream


# ---- libraries


def build(source: Path, flags: Sequence[str], load: Callable[[Path], Any]) -> Any:
    """What ``load`` returns for the library of this C++ source, which is kept where kernels are."""
    text = source.read_text()
    key = native.machine_key("stand-in", text, *flags)
    return native.get(native.Library(key, lambda: native.Source(text, flags), load)).value


@functools.cache
def _native() -> Any:
    """The compiled part of the device."""
    host_headers = Path(registry.__file__).parent / "host"
    flags = [*inductor.BASE_FLAGS, f"-I{host_headers}", f"-I{sysconfig.get_path('include')}", "-O0", "-ltorch_python"]

    def load(path: Path) -> Any:
        loader = importlib.machinery.ExtensionFileLoader("stand_in_device", str(path))
        spec = importlib.util.spec_from_loader(loader.name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        del module.__file__  # as in the registry
        return module

    return build(Path(__file__).with_name("stand_in_device.cpp"), flags, load)


# ---- operations


def _is_here(x: Any) -> bool:
    return isinstance(x, (torch.Tensor, torch.device)) and (x if isinstance(x, torch.device) else x.device).type == TYPE


def host(x: Any) -> Any:
    """A tensor on the CPU with the memory of one on the device; anything else is returned as it is."""
    if not _is_here(x):
        return x
    return torch.device("cpu") if isinstance(x, torch.device) else _native().alias(x, -1)


def _index(args: Any) -> int:
    """The device of an operation."""
    here = [x for x in tree_leaves(args) if _is_here(x)]
    devices = [x.device if isinstance(x, torch.Tensor) else x for x in here]
    return next((d.index for d in devices if d.index is not None), _native().get_device())


def _operation(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation on the device."""
    if op.is_view or op.overloadpacket is aten.set_:  # the CPU's reads and writes no element
        return op.redispatch(_CPU, *args, **kwargs)
    index = _index((args, kwargs))
    if _state.forbidden and op.overloadpacket in _WAITING:
        raise WaitError(f"{op} waits for the device")
    run = functools.partial(_run, op, args, kwargs, index)
    if _state.graph is None:
        return run()
    written = [given for a, given in _arguments(op, args, kwargs) if a.alias_info is not None and a.alias_info.is_write]
    if written:
        if any(isinstance(t, torch.Tensor) and not t.numel() for t in written):
            run()  # an `out` that is new takes its shape
        _state.graph.actions.append(run)
        return _results(op, args, kwargs, [None] * len(op._schema.returns), index)
    result = run()
    for t in tree_leaves(result):
        host(t).fill_(torch.nan if t.is_floating_point() else 0)  # nothing has run yet
        _state.graph.memory.append(t)
    if "empty" not in op.name():
        _state.graph.actions.append(lambda: tree_map(_overwrite, result, run()))
    return result


def _arguments(op: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """What the schema says of each argument, with its value."""
    return [(a, kwargs.get(a.name, args[i] if i < len(args) else None)) for i, a in enumerate(op._schema.arguments)]


def _overwrite(target: torch.Tensor, value: torch.Tensor) -> None:
    host(target).copy_(host(value))


def _run(op: Any, args: Any, kwargs: Any, index: int) -> Any:
    given, named = tree_map(host, (args, kwargs))
    made = op(*given, **named)
    return _results(op, args, kwargs, [made] if len(op._schema.returns) == 1 else list(made or ()), index)


def _results(op: Any, args: Any, kwargs: Any, made: list[Any], index: int) -> Any:
    """What an operation returns, on the device: new tensors, or those of its arguments that it has written to."""
    results = []
    for value, returned in zip(made, op._schema.returns, strict=True):
        if returned.alias_info is None:
            results.append(tree_map(lambda t: _native().alias(t, index) if isinstance(t, torch.Tensor) else t, value))
            continue
        names = returned.alias_info.before_set
        arguments = _arguments(op, args, kwargs)
        written = next(given for a, given in arguments if a.alias_info and a.alias_info.before_set & names)
        if value is not None and written.shape != value.shape:
            _native().adopt(written, value)
        results.append(written)
    return results[0] if len(results) == 1 else tuple(results) or None


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    crosses = not (_is_here(source) and _is_here(target))
    if _state.forbidden and crosses and not (_is_here(target) and non_blocking):
        raise WaitError(f"a copy from {source.device} to {target.device} waits for the device")
    run = functools.partial(_overwrite, target, source)
    run() if _state.graph is None else _state.graph.actions.append(run)
    return target


def _sparse(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on tensors of which some are sparse: torch's for the CPU asks its values for operations."""
    device = _native()
    before, index = device.get_device(), _index((args, kwargs))
    if _state.forbidden and op.overloadpacket in _WAITING:
        raise WaitError(f"{op} waits for the device")
    device.set_device(index)
    try:
        return op.redispatch(_SPARSE_CPU, *args, **kwargs)
    finally:
        device.set_device(before)


@functools.cache
def register() -> tuple[Any, ...]:
    """Makes the devices known to torch in this process, for good."""
    _native()
    # torch imports a module of this name; as an attribute of torch it would be asked for more, such as random numbers
    sys.modules.setdefault(f"torch.{TYPE}", types.ModuleType(f"torch.{TYPE}"))
    everything, library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_operation, "PrivateUse1")
    everything.fallback(_sparse, "SparsePrivateUse1")
    library.impl("_copy_from", _copy, "PrivateUse1")
    library.impl("_local_scalar_dense", functools.partial(_operation, aten._local_scalar_dense.default), "PrivateUse1")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("SparseCPU"):
        if name.startswith("aten::"):  # also those that would be made of others by default
            packet, _, overload = name.removeprefix("aten::").partition(".")
            op = getattr(getattr(aten, packet), overload or "default")
            library.impl(name.removeprefix("aten::"), functools.partial(_sparse, op), "SparsePrivateUse1")
    return everything, library
