"""Native libraries: loaded from disk if they are there, else compiled and published for the next process."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

import torch

from compiled_optim._engine.cache.compiler import BuildError, compile_library, find_compiler, private_directory
from compiled_optim._engine.cache.store import SCHEMA, Fact, Store, counters, open_store
from compiled_optim._engine.cache.tidy import tidy
from compiled_optim.version import __version__

T = TypeVar("T")

LOCK_SECONDS = 120.0  # several times what a library takes to compile


class NoCompilerError(RuntimeError):
    """A library must be compiled and there is no C++ compiler."""


class Source(NamedTuple):
    """What a library is compiled from; bytes are the library itself. ``facts`` are recorded with it on disk."""

    text: str | bytes
    flags: Sequence[str]
    facts: Mapping[str, Fact] = {}


@dataclass(frozen=True)
class Library(Generic[T]):
    """How to get a library.

    Args:
        key: from `machine_key`.
        produce: called only if the library must be compiled.
        load: opens a library and checks that it fits; raises OSError, ImportError or RuntimeError if it does not. A
            library from disk that does not load is compiled again, once.
        persistent: whether the library is looked for and kept on disk.
        suffix: how the name of its file ends.
        compiled: whether a C++ compiler makes it, and makes it anew when the compiler has changed.
    """

    key: str
    produce: Callable[[], Source]
    load: Callable[[Path], T]
    persistent: bool = True
    suffix: str = ".so"
    compiled: bool = True


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """What `load` returned, the library's facts and origin, and the seconds since it was asked for."""

    value: T
    facts: Mapping[str, Fact]
    origin: Literal["disk", "compiled", "memory"]
    seconds: float


class Future(threading.Thread, Generic[T]):
    """A library loaded from disk or, failing that, compiled, published and loaded by a daemon thread.

    ``underway`` is set once the library is there, its compiler runs, or another process compiles it: from then on it
    takes time but no Python code.

    Args:
        library: what to get.
        wait: whether to wait for another writer that is compiling the library; if not, the future fails.
    """

    def __init__(self, library: Library[T], *, wait: bool = True) -> None:
        super().__init__(name="compiled_optim", daemon=True)
        self.underway = threading.Event()
        self._begun = time.perf_counter()
        self._library, self._wait = library, wait
        self._store = open_store() if library.persistent else None  # in the thread of the caller, whom it may warn
        self._compiler = find_compiler() if library.compiled else None
        self._cancelled, self._done = threading.Event(), threading.Event()
        self._outcome: Loaded[T] | BaseException | None = self._find("disk")  # here: a warm start needs no thread
        if self._outcome is None:
            self.start()
        else:
            self.underway.set()

    @property
    def failed(self) -> bool:
        """Whether `result` will raise, as in a child that was forked before the library was there."""
        return isinstance(self._outcome, BaseException) or (self._outcome is None and not self.is_alive())

    def result(self) -> Loaded[T]:
        """Waits for the library. An exception in the meantime, such as an interrupt, stops the compiler.

        Raises:
            NoCompilerError: there is no C++ compiler, and the library is not on disk.
            BuildError: the compiler failed, or this process was forked while it ran.
            Exception: what `produce` raised, or `load` on a library just compiled.
        """
        try:
            self._finish()
        except BaseException:
            self.cancel()
            raise
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        if self._outcome is None:
            raise BuildError(f"{self._library.key} is compiled by the process that forked this one, not by this one")
        return self._outcome

    def cancel(self) -> None:
        """Stops the compiler, if it runs, and waits until nothing is left of it."""
        self._cancelled.set()
        self._finish()

    def _finish(self) -> None:
        if self.is_alive():  # not so in a forked child, which would wait for ever
            self._done.wait()  # `join` takes the thread for dead once it was interrupted (CPython issue 90882)

    def run(self) -> None:
        try:
            self._outcome = self._compile()
        except BaseException as error:
            self._outcome = error
        finally:
            self.underway.set()
            self._done.set()

    def _find(self, origin: Literal["disk", "compiled"]) -> Loaded[T] | None:
        if self._store is None:
            return None
        fingerprint = None if self._compiler is None else self._compiler.fingerprint
        found = self._store.load(self._library.key, fingerprint, self._library.load)
        return None if found is None else Loaded(*found, origin, time.perf_counter() - self._begun)

    def _compile(self) -> Loaded[T]:
        if self._library.compiled and self._compiler is None:
            raise NoCompilerError(
                f"no C++ compiler to compile a kernel with (CXX is {os.environ.get('CXX', '')!r}): install g++ or "
                "clang++, or set CXX to a compiler"
            )
        with ExitStack() as stack:
            held = self._store is not None and self._lock(self._store, stack)
            if (found := self._find("disk")) is not None:  # another writer was faster
                return found
            source = self._library.produce()
            self.underway.set()
            output = stack.enter_context(private_directory()) / f"library{self._library.suffix}"
            atexit.register(self.cancel)  # or the directory would stay behind
            stack.callback(atexit.unregister, self.cancel)
            fingerprint = ""
            if isinstance(source.text, bytes):
                output.write_bytes(source.text)
            else:
                assert self._compiler is not None
                compile_library(self._compiler, source.text, source.flags, output, self._cancelled)
                fingerprint = self._compiler.fingerprint
            published = (self._library.key, output, source.facts, fingerprint)
            if held and self._store is not None and self._store.publish(*published):
                tidy(self._store, self._library.key)
                if (found := self._find("compiled")) is not None:
                    return found
            value = self._library.load(output)  # once loaded, the file may be deleted
            return Loaded(value, source.facts, "compiled", time.perf_counter() - self._begun)

    def _lock(self, store: Store, stack: ExitStack) -> bool:
        """Whether this thread is the only writer; otherwise nothing may be published."""
        key = self._library.key
        if stack.enter_context(store.writer(key)):
            return True
        if not self._wait:
            raise BuildError(f"{key} is being compiled by another writer, or locks do not work")
        self.underway.set()
        if stack.enter_context(store.writer(key, LOCK_SECONDS, self._cancelled)):
            return True
        if self._cancelled.is_set():
            raise BuildError(f"{key} was cancelled")
        counters.count_error(f"{key} is not published: it is locked by another writer, or locks do not work")
        return False


def get(library: Library[T]) -> Loaded[T]:
    """`Future(library).result()`."""
    return Future(library).result()


def machine_key(*parts: str) -> str:
    """A key for code that is made from `parts` and runs with this Python and this torch only.

    Args:
        parts: whatever else the code depends on: its rule, switches, dtypes, the compiler's flags, the device. They are
            told apart, so ("a", "bc") and ("ab", "c") have different keys.
    """
    return hashlib.sha256(json.dumps([*_machine(), *parts]).encode()).hexdigest()[:32]


@functools.cache
def _machine() -> tuple[str, ...]:
    return (
        str(SCHEMA),
        __version__,
        torch.__version__,
        str(torch.version.git_version),
        str(sys.implementation.cache_tag),
        EXTENSION_SUFFIXES[0],  # the ABI; `sysconfig` would take 1 ms to import
        sys.platform,
        platform.machine(),
    )
