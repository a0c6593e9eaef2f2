"""Obtain a native library: from disk if it is there, else compiled, and published for the next process."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
import sysconfig
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch

from compiled_optim._engine.cache.compiler import Build, find_compiler, private_directory, start_build
from compiled_optim._engine.cache.store import SCHEMA, Fact, counters, open_store
from compiled_optim._engine.cache.tidy import tidy
from compiled_optim.version import __version__

T = TypeVar("T")
Produce = Callable[[], tuple[str, Sequence[str]]]

LOCK_SECONDS = 120.0  # several times what a library takes to compile
_LOAD_ERRORS = (OSError, ImportError, RuntimeError)


class NoCompilerError(RuntimeError):
    """A library must be compiled and there is no C++ compiler."""


@dataclass(frozen=True)
class Library(Generic[T]):
    """A loaded library: what `load` made of it, where it came from, and the seconds since it was asked for."""

    value: T
    origin: Literal["disk", "compiled"]
    seconds: float
    facts: Mapping[str, Fact]


class Pending(Generic[T]):
    """A library that was asked for; see `begin`. Use it from one thread at a time."""

    def __init__(
        self, key: str, produce: Produce, load: Callable[[Path], T], facts: Mapping[str, Fact], persistent: bool
    ) -> None:
        self._begun = time.perf_counter()
        self._key, self._produce, self._load, self._facts = key, produce, load, facts
        self._store = open_store() if persistent else None
        self._compiler = find_compiler()
        self._build: Build | None = None
        self._held = False
        self._stack = ExitStack()
        weakref.finalize(self, self._stack.close)  # dropped, or at exit: stop the compiler, delete its directory
        self._library = self._find()
        if self._library is None:
            # Without waiting: who waits for a lock while holding another one may be waited for in turn.
            self._start(lock_seconds=0)

    def result(self) -> Library[T]:
        """Wait for the library and load it; the same one again when called again.

        Raises:
            BuildError: the compiler failed.
            OSError, ImportError, RuntimeError: what `load` raised on a library just compiled.
        """
        try:
            if self._library is None and self._build is None:
                self._start(lock_seconds=LOCK_SECONDS)
            if self._library is None:
                assert self._build is not None
                self._library = self._finish(self._build)
        finally:
            self._close()
        return self._library

    def _close(self) -> None:
        self._build, self._held = None, False
        self._stack.close()

    def _find(self, origin: Literal["disk", "compiled"] = "disk") -> Library[T] | None:
        if self._store is None:
            return None
        with self._store.find(self._key, None if self._compiler is None else self._compiler.fingerprint) as entry:
            if entry is None:
                return None
            try:
                return self._loaded(entry.path, origin, entry.facts)
            except _LOAD_ERRORS as error:  # perhaps because nothing may be executed from that file system
                self._store.set_aside(self._key, entry.library, f"{entry.library.name} does not load: {error}")
                return None

    def _start(self, lock_seconds: float) -> None:
        """Find the library or start to compile it; neither if another writer does, and is not to be waited for."""
        if self._compiler is None:
            raise NoCompilerError(
                f"no C++ compiler to compile a kernel with (CXX is {os.environ.get('CXX', '')!r}): install g++ or "
                "clang++, or set CXX to a compiler"
            )
        try:
            if self._store is not None:
                self._held = self._stack.enter_context(self._store.writer(self._key, lock_seconds))
                if not self._held and lock_seconds == 0:
                    return
                self._library = self._find()  # another writer may have been faster
            if self._library is None:
                source, flags = self._produce()
                directory = self._stack.enter_context(private_directory())
                self._build = start_build(self._compiler, source, flags, directory / "library.so")
                self._stack.callback(self._build.stop)
            else:
                self._close()
        except BaseException:
            self._close()
            raise

    def _finish(self, build: Build) -> Library[T]:
        build.wait()
        if self._compiler is not None and self._store is not None and self._held:
            try:
                self._store.publish(self._key, build.output, self._facts, self._compiler.fingerprint)
            except OSError as error:
                counters.count_error(f"{self._key} cannot be published: {error}")
            else:
                with suppress(OSError):
                    tidy(self._store, self._key)
                if (library := self._find("compiled")) is not None:
                    return library
        elif self._store is not None:
            counters.count_error(f"{self._key} is not published: it is locked by another writer, or locks do not work")
        return self._loaded(build.output, "compiled", self._facts)  # once loaded, the file may be deleted

    def _loaded(self, path: Path, origin: Literal["disk", "compiled"], facts: Mapping[str, Fact]) -> Library[T]:
        value = self._load(path)
        return Library(value, origin, time.perf_counter() - self._begun, dict(facts))


def begin(
    key: str,
    produce: Produce,
    load: Callable[[Path], T],
    facts: Mapping[str, Fact] | None = None,
    *,
    persistent: bool = True,
) -> Pending[T]:
    """Ask for a library: load it from disk at once, or start to compile it.

    To compile several at once, begin them all and then ask for their results in the same order.

    Args:
        key: from `machine_key`.
        produce: gives the C++ source and the compiler's flags. Called only if the library must be compiled, in this
            thread, by `begin` or (if another process was compiling it) by `result`.
        load: opens a library and checks that it fits; raises OSError, ImportError or RuntimeError if it does not. A
            library from disk that does not load is compiled again, once.
        facts: recorded with the library, for whoever finds it on disk. Read after `produce`, which may add to it.
        persistent: whether the library is looked for and kept on disk.

    Raises:
        NoCompilerError: there is no C++ compiler, and the library is not on disk.
        BuildError: the compiler cannot be started.
        Exception: anything `produce` raises.
    """
    return Pending(key, produce, load, {} if facts is None else facts, persistent)


def obtain(
    key: str, produce: Produce, load: Callable[[Path], T], facts: Mapping[str, Fact] | None = None
) -> Library[T]:
    """Load a library from disk, or compile and publish it.

    It is `begin(...).result()`; see there for the arguments and errors.
    """
    return begin(key, produce, load, facts).result()


def machine_key(*parts: str) -> str:
    """A key for code that is made from `parts` and runs on this machine, with this Python and this torch only.

    Args:
        parts: whatever else the code depends on: its rule, switches, dtypes, the compiler's flags. They are told
            apart, so ("a", "bc") and ("ab", "c") have different keys.
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
        str(sysconfig.get_config_var("SOABI")),
        sys.platform,
        platform.machine(),
        _processor(),
    )


def _processor() -> str:
    """What decides which instructions the processor has; /proc/cpuinfo names these differently on x86 and Arm."""
    names = {"vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU architecture", "CPU part", "Features"}
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n", 1)[0]
    except OSError:
        first = ""
    lines = [line.split(":", 1) for line in first.splitlines() if ":" in line]
    chosen = [f"{name.strip()}:{value.strip()}" for name, value in lines if name.strip() in names]
    return "\n".join(chosen) or platform.processor()
