"""The kernels of this process: each is lowered and compiled at most once, whatever optimizers and models ask for it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import os
import sysconfig
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from compiled_optim._engine import process, settings
from compiled_optim._engine.cache import native
from compiled_optim._engine.kernels.backends.cpu import translation_unit
from compiled_optim._engine.kernels.references import UnknownReferenceError, is_own, references
from compiled_optim._engine.kernels.trace import Signature, trace
from compiled_optim._engine.torch_private import dynamo, inductor


class CacheInfo(NamedTuple):
    """Counts since the process began or `cache_clear`.

    ``hits``: requests answered from memory; ``disk_hits``: from disk; ``misses``: by compiling; ``kernels``: how many
    are loaded now.
    """

    hits: int
    disk_hits: int
    misses: int
    kernels: int


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel. ``address``: of its launch function; ``origin``: "compiled", "disk", or "memory" if this process
    had it already; ``seconds``: from request to loaded, when it was loaded."""

    signature: Signature
    address: int
    origin: str
    seconds: float
    bytes_per_element: int
    library: ctypes.CDLL


_ENGINE = Path(__file__).parents[1]
_HOST = Path(__file__).parent / "host"
_kernels: dict[Signature, Kernel] = {}
_MOST_VERSIONS = 8  # of what one rule refers to
_counts = {"hits": 0, "disk_hits": 0, "misses": 0}
_host: ModuleType | None = None
_ahead: set[Signature] = set()  # obtained before they were asked for
_lock = process.new_lock()


def cache_info() -> CacheInfo:
    """How often kernels were asked for, and where they came from."""
    return CacheInfo(**_counts, kernels=len(_kernels))


def forget() -> None:
    """Empties the cache in memory and its counts. Optimizers that hold a kernel keep it."""
    with _lock:
        _kernels.clear()
        _ahead.clear()
        _counts.update(dict.fromkeys(_counts, 0))


def obtain(signatures: Sequence[Signature]) -> tuple[ModuleType, dict[Signature, Kernel]]:
    """The host module and a kernel for each signature; what must be compiled is compiled side by side.

    Raises:
        native.NoCompilerError, build.BuildError, inductor.LoweringError: see there.
    """
    with _lock:
        wanted = dict.fromkeys(signatures)
        new = _load(wanted) | _ahead.intersection(wanted)
        _ahead.difference_update(new)
        _counts["hits"] += len(wanted) - len(new)
        assert _host is not None
        return _host, {s: k if s in new else replace(k, origin="memory") for s in wanted for k in (_kernels[s],)}


def begin(signatures: Sequence[Signature]) -> None:
    """Begins what `obtain` will be asked for, and returns while it is compiled; raises nothing, as `obtain` will."""
    begun = threading.Event()
    traced_around = inductor.holds_dynamo()

    def let_go() -> None:
        inductor.excuse_from_dynamo(False)
        begun.set()

    def run() -> None:
        # who holds the lock may wait for Dynamo's, which the caller may hold: the caller does not wait then
        if _lock.acquire(blocking=False):
            inductor.excuse_from_dynamo(traced_around)
        else:
            let_go()
            _lock.acquire()
        try:
            _ahead.update(_load(signatures, let_go))
        except Exception as error:
            settings.logger.info("%s could not be obtained ahead: %s", [s.name for s in signatures], error)
        finally:
            _lock.release()
            let_go()

    # a thread of its own, which waits for the compiler; and the caller may be tracing, which lowering is no part of
    threading.Thread(target=run, name="compiled_optim", daemon=True).start()
    begun.wait()  # until all is lowered


def _load(signatures: Iterable[Signature], begun: Callable[[], None] = lambda: None) -> set[Signature]:
    """Loads the host module and the kernels that are not loaded; which they are. Calls ``begun`` once all are begun."""
    global _host
    host = _begin_host() if _host is None else None
    # in one order everywhere: two processes that begin the same kernels wait for each other's locks
    wanted = sorted(dict.fromkeys(signatures), key=repr)
    pending = {s: _begin(s) for s in wanted if s not in _kernels}
    begun()
    if host is not None:
        _host = host.result().value
    for signature, library in pending.items():
        _kernels[signature] = _finish(signature, library.result())
    return set(pending)


def host_module() -> ModuleType:
    """The compiled host module (host/host.cpp)."""
    return obtain(())[0]


def _begin(signature: Signature) -> native.Pending[ctypes.CDLL]:
    facts: dict[str, Any] = {"name": signature.name}

    def produce() -> tuple[str, Sequence[str]]:
        versions = {s.references for s in _kernels if s.rule is signature.rule}
        if len(versions - {signature.references}) >= _MOST_VERSIONS:
            raise inductor.UntraceableError(f"what the update of {signature.name} refers to changes again and again")
        lowered = inductor.lower_cpp(trace(signature))
        facts["bytes_per_element"] = bytes_per_element(signature, lowered)
        return translation_unit(signature, lowered), inductor.cpp_flags()

    def load(path: Path) -> ctypes.CDLL:
        library = ctypes.CDLL(str(path))
        arguments = getattr(library, "signature", lambda: None)()
        if arguments != len(signature.flat) * 100 + len(signature.scalars):
            raise ImportError(f"it takes other arguments than {signature.name}")
        return library

    identity, persistent = _identity(signature)
    key = native.machine_key("kernel", _engine(), torch.backends.cpu.get_cpu_capability(), *identity)
    return native.begin(key, produce, load, facts, persistent=persistent)


def _finish(signature: Signature, library: native.Library[ctypes.CDLL]) -> Kernel:
    address = ctypes.cast(library.value.launch, ctypes.c_void_p).value
    assert address is not None
    traffic = int(library.facts["bytes_per_element"])  # type: ignore[arg-type]
    _counts["disk_hits" if library.origin == "disk" else "misses"] += 1
    settings.logger.info("%s: %s in %.1f s", signature.name, library.origin, library.seconds)
    return Kernel(signature, address, library.origin, library.seconds, traffic, library.value)


def bytes_per_element(signature: Signature, lowered: inductor.Lowered) -> int:
    """The memory traffic of one element: an input that is read and written is two arguments of the kernel."""
    flat = [i for i in lowered.arguments if i is not None and i < len(signature.flat)]
    return sum(signature.flat_dtypes[i].itemsize for i in flat)


def _begin_host() -> native.Pending[ModuleType]:
    source = (_HOST / "host.cpp").read_text()
    headers = [file.read_text() for file in sorted(_HOST.glob("*.h"))]
    # it is compiled beside the first kernel: at -O2 it would take longer than that, and is not faster
    flags = [*inductor.BASE_FLAGS, "-O1", "-finline-small-functions", "-fstrict-aliasing"]
    flags += [f"-I{_HOST}", f"-I{sysconfig.get_path('include')}"]

    def load(path: Path) -> ModuleType:
        loader = importlib.machinery.ExtensionFileLoader("compiled_optim._host", str(path))  # its name in sys.modules
        spec = importlib.util.spec_from_loader(loader.name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        with dynamo.outside_modes():
            sample = torch.empty(5, 7, dtype=torch.float64, device="cpu")
        module.start(torch.Tensor, torch.nn.Parameter, sample, sample.data_ptr())
        return module

    return native.begin(native.machine_key("host", source, *headers, *flags), lambda: (source, flags), load)


def _identity(signature: Signature) -> tuple[list[str], bool]:
    """What a kernel on disk is known by, and whether that is all it depends on."""
    cls = signature.rule.owner
    dtypes = ",".join(map(str, signature.dtypes))
    names = ",".join((*signature.buffers, "|", *signature.scalars))
    form: Any
    try:
        # of the package's own its file says it all, and a warm start need not look at bytecode
        form = _source_of(cls.update) if is_own(cls.update) else signature.references or references(cls.update)
        complete = _in_a_file(cls)
    except UnknownReferenceError:
        form, complete = (), False
    return [f"{cls.__module__}.{cls.__qualname__}", repr(form), repr(signature.switches), dtypes, names], complete


def _in_a_file(cls: type) -> bool:
    """Whether the class's source is in a file: what a notebook or a prompt defines is not kept on disk."""
    try:
        return os.path.isfile(inspect.getfile(cls))
    except (OSError, TypeError):
        return False


def _source_of(rule: Any) -> str:
    return hashlib.sha256(Path(rule.__globals__["__file__"]).read_bytes()).hexdigest()


@functools.cache
def _engine() -> str:
    """A hash of the files that decide what a rule is compiled to."""
    files = ("rule.py", "values.py", "kernels/trace.py", "kernels/backends/cpu.py", "torch_private/inductor.py")
    return hashlib.sha256(b"\0".join((_ENGINE / f).read_bytes() for f in files)).hexdigest()
