"""The kernels of this process: each is lowered and compiled at most once, whatever optimizers and models ask for it."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from compiled_optim._engine import process, settings
from compiled_optim._engine.cache import native
from compiled_optim._engine.cache.store import Fact
from compiled_optim._engine.kernels import staged
from compiled_optim._engine.kernels.backends import backend_named
from compiled_optim._engine.kernels.references import UnknownReferenceError, all_references, is_own
from compiled_optim._engine.kernels.trace import Signature, trace
from compiled_optim._engine.torch_private import dynamo, inductor


class CacheInfo(NamedTuple):
    """Counts since the process began, or since `cache_clear`.

    Attributes:
        hits: requests for a kernel that was in memory.
        disk_hits: requests for a kernel that was on disk.
        misses: requests for a kernel that had to be compiled.
        kernels: how many kernels are loaded now.
    """

    hits: int
    disk_hits: int
    misses: int
    kernels: int


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel.

    ``entry`` is the address of its C function (host/plan.h), valid while ``keepalive`` lives. ``origin`` is "compiled",
    "disk", or "memory" if this process had it already. ``seconds`` are from the request to the loaded kernel.
    """

    signature: Signature
    entry: int
    keepalive: object
    origin: str
    seconds: float
    bytes_per_element: int


_ENGINE = Path(__file__).parents[1]
_HOST = Path(__file__).parent / "host"
_kernels: dict[Signature, Kernel] = {}
_MOST_VERSIONS = 8  # of what one rule refers to
_counts = {"hits": 0, "disk_hits": 0, "misses": 0}
_host: ModuleType | None = None
_ahead: dict[Signature | None, native.Future[Any]] = {}  # prefetched, and not asked for since; None: the host module
_lock = process.new_lock()


def cache_info() -> CacheInfo:
    """How often kernels were asked for, and where they came from.

    Example:
        >>> import compiled_optim
        >>> compiled_optim.cache_clear()
        >>> compiled_optim.cache_info()
        CacheInfo(hits=0, disk_hits=0, misses=0, kernels=0)
    """
    return CacheInfo(**_counts, kernels=len(_kernels))


def forget() -> None:
    """Empties the cache in memory and its counts. Optimizers that hold a kernel keep it."""
    with _lock:
        _kernels.clear()
        _ahead.clear()
        _counts.update(dict.fromkeys(_counts, 0))


def get(signatures: Sequence[Signature]) -> tuple[ModuleType, dict[Signature, Kernel]]:
    """The host module and a kernel for each signature; what must be compiled is compiled side by side.

    Raises:
        native.NoCompilerError, compiler.BuildError, inductor.LoweringError: see there.
    """
    global _host
    with _lock:
        wanted = dict.fromkeys(signatures)
        new = [s for s in wanted if s not in _kernels]
        with _compiling(new) as futures:
            _host = _host or futures[None].result().value
            _kernels.update((s, _kernel(s, futures[s].result())) for s in new)
        _counts["hits"] += len(wanted) - len(new)
        return _host, {s: k if s in new else replace(k, origin="memory") for s in wanted for k in (_kernels[s],)}


def prefetch(signatures: Iterable[Signature]) -> None:
    """Lowers what `get` will be asked for, and returns while it is compiled.

    Raises nothing but interrupts: what fails here fails in `get` again. Takes no lock that `get` holds, because the
    caller may hold Dynamo's lock, and `get` may be waiting for that.
    """
    new = [s for s in dict.fromkeys(signatures) if s not in _kernels]
    try:
        with _compiling(new, wait=False) as futures:
            _ahead.update(futures)
    except Exception as error:
        settings.logger.info("%s could not be prefetched: %s", [s.name for s in signatures], error)


@contextmanager
def _compiling(new: Iterable[Signature], wait: bool = True) -> Iterator[dict[Signature | None, native.Future[Any]]]:
    """Futures of kernels and of the host module, unless it is loaded; an exception in the context stops the compilers.

    All are lowered, one after another, when the context is entered.
    """
    excused = inductor.holds_dynamo()
    futures: dict[Signature | None, native.Future[Any]] = {}
    try:
        for wanted in (*([None] if _host is None else []), *new):
            future = _ahead.pop(wanted, None)
            if future is None or future.failed:
                library = _host_library() if wanted is None else _library(wanted, excused)
                future = native.Future(library, wait=wait)
            futures[wanted] = future
            future.underway.wait()
            if future.failed:
                future.result()
        yield futures
    except BaseException:
        for future in futures.values():
            future.cancel()
        raise


def host_module() -> ModuleType:
    """The compiled host module (host/host.cpp)."""
    return get(())[0]


def _library(signature: Signature, excused: bool) -> native.Library[tuple[int, object]]:
    """``excused``: whether it is lowered without Dynamo's lock, which the caller holds until that is done."""
    backend = backend_named(signature.backend)
    versions = {s.references for s in _kernels if s.rule is signature.rule} - {signature.references}

    identity, persistent = _identity(signature)
    if not signature.rule.elementwise:
        return _staged_library(signature, excused, identity, persistent)

    def produce() -> native.Source:
        inductor.excuse_from_dynamo(excused)
        if len(versions) >= _MOST_VERSIONS:
            raise inductor.UntraceableError(f"what the update of {signature.name} refers to changes again and again")
        lowered = backend.lower(trace(signature, backend.graph_device))
        facts: dict[str, Fact] = {"name": signature.name, "bytes_per_element": bytes_per_element(signature, lowered)}
        return native.Source(*backend.program(signature, lowered), facts)

    key = native.machine_key("kernel", _engine(), backend.name, *backend.identity(), *identity)
    load = functools.partial(backend.load, signature=signature)
    return native.Library(key, produce, load, persistent, backend.suffix, backend.compiled)


def _staged_library(
    signature: Signature, excused: bool, identity: Sequence[str], persistent: bool
) -> native.Library[tuple[int, object]]:
    """The same for a rule that reduces."""

    def produce() -> native.Source:
        inductor.excuse_from_dynamo(excused)
        return native.Source(*staged.program(signature))

    key = native.machine_key("stages", _engine(), *backend_named("cpu").identity(), staged.identity(), *identity)
    return native.Library(key, produce, functools.partial(staged.load, signature=signature), persistent)


def _kernel(signature: Signature, library: native.Loaded[tuple[int, object]]) -> Kernel:
    traffic = int(library.facts["bytes_per_element"])  # type: ignore[arg-type]
    _counts["disk_hits" if library.origin == "disk" else "misses"] += 1
    settings.logger.info("%s: %s in %.1f s", signature.name, library.origin, library.seconds)
    return Kernel(signature, *library.value, library.origin, library.seconds, traffic)


def bytes_per_element(signature: Signature, lowered: inductor.Lowered) -> int:
    """The memory traffic of one element: an input that is read and written is two arguments of the kernel."""
    flat = [i for i in lowered.arguments if i is not None and i < len(signature.flat)]
    return sum(signature.flat_dtypes[i].itemsize for i in flat)


def _host_library() -> native.Library[ModuleType]:
    source = (_HOST / "host.cpp").read_text()
    headers = [file.read_text() for file in sorted(_HOST.glob("*.h"))]
    # -O2 would take longer to compile than the first kernel, beside which this is compiled, and run no faster
    flags = [*inductor.BASE_FLAGS, "-O1", "-finline-small-functions", "-fstrict-aliasing"]

    def produce() -> native.Source:
        return native.Source(source, [*flags, f"-I{_HOST}", f"-I{sysconfig.get_path('include')}"])

    def load(path: Path) -> ModuleType:
        loader = importlib.machinery.ExtensionFileLoader("compiled_optim._host", str(path))  # its name in sys.modules
        spec = importlib.util.spec_from_loader(loader.name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        # It was loaded through an open file, whose number is soon another one's; tools read the files of all modules.
        del module.__file__
        with dynamo.outside_modes():
            sample = torch.empty(5, 7, dtype=torch.float64, device="cpu")
        module.start(torch.Tensor, torch.nn.Parameter, sample, sample.data_ptr())
        return module

    key = native.machine_key("host", source, *headers, *flags)
    return native.Library(key, produce, load)


def _identity(signature: Signature) -> tuple[list[str], bool]:
    """What identifies a kernel on disk, and whether the kernel depends on nothing else."""
    cls = signature.rule.owner
    dtypes = ",".join(map(str, signature.flat_dtypes))
    names = ",".join((*signature.buffers, "|", *signature.scalars))
    form: Any
    try:
        # a rule of the package depends on its file alone, so a warm start need not look at bytecode
        functions = signature.rule.frozen(signature.on_device)
        own = [_source_of(function) for function in functions if is_own(function)]
        form = (own, signature.references or all_references(functions))
        complete = _in_a_file(cls)
    except UnknownReferenceError:
        form, complete = ([], None), False
    extras = (signature.rule.extras,) if signature.rule.extras.any else ()
    kind = repr(
        (signature.switches, signature.on_device, signature.constants, signature.scaled, signature.by_rows, *extras)
    )
    return [f"{cls.__module__}.{cls.__qualname__}", repr(form), kind, dtypes, names], complete


def _in_a_file(cls: type) -> bool:
    """Whether the class is defined in a file: what a notebook or a prompt defines is not kept on disk."""
    try:
        return os.path.isfile(inspect.getfile(cls))
    except (OSError, TypeError):
        return False


def _source_of(rule: Any) -> str:
    return hashlib.sha256(Path(rule.__globals__["__file__"]).read_bytes()).hexdigest()


@functools.cache
def _engine() -> str:
    """A hash of the files that decide what every backend is given to lower."""
    lowering = ("torch_private/inductor.py", "torch_private/bfloat16.h")
    files = ("one_pass.py", "record.py", "rule.py", "values.py", "kernels/trace.py", *lowering)
    return hashlib.sha256(b"\0".join((_ENGINE / f).read_bytes() for f in files)).hexdigest()
