"""What the fault-injection tests need: compilers that misbehave, children that die, and ways to damage an entry."""

import ctypes
import errno
import hashlib
import json
import os
import pickle
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from compiled_optim._engine.cache import compiler, native, store

SOURCE = 'extern "C" int answer() { return 42; }'
Call = Callable[..., Any]
Failure = Callable[[], object]
Damage = Callable[[Path], object]
KEY, OTHER_KEY = "0123456789abcdef" * 2, "fedcba9876543210" * 2


@dataclass
class Here:
    """A place for one test: its cache, its temporary files, its compiler and how often that ran."""

    path: Path
    real: Path
    monkeypatch: pytest.MonkeyPatch

    def __post_init__(self) -> None:
        self.cache, self.temporary, self.log = (self.path / name for name in ("cache", "temporary", "log"))
        self.temporary.mkdir()
        self.log.touch()
        self.use(copying_compiler(self.path / "cxx", self.real, self.log))
        self.monkeypatch.setenv("COMPILED_OPTIM_CACHE_DIR", str(self.cache))
        self.monkeypatch.delenv("COMPILED_OPTIM_DISK_CACHE", raising=False)
        self.monkeypatch.setattr(tempfile, "tempdir", str(self.temporary))

    def use(self, compiler: Path | str) -> None:
        self.monkeypatch.setenv("CXX", str(compiler))

    def builds(self) -> int:
        return self.log.read_text().count("built")


def program(path: Path, body: str) -> Path:
    """An executable script, in shell unless it says otherwise; `$output` is the library that it is asked for."""
    path.write_text(body if body.startswith("#!") else f"#!/bin/sh\nfor output; do :; done\n{body}\n")
    path.chmod(0o700)
    return path


def copying_compiler(path: Path, library: Path, log: Path, before: str = "") -> Path:
    """A compiler that hands out a finished library and adds a line to a log."""
    quoted = [shlex.quote(str(name)) for name in (log, library)]
    return program(path, f'echo built >> {quoted[0]}\n{before}\ncp {quoted[1]} "$output"')


class Gate:
    """A compiler that says it has started, then waits to be let through; any number of it may run."""

    def __init__(self, here: Here) -> None:
        names = [here.path / "started", here.path / "go"]
        for name in names:
            os.mkfifo(name)
        self._started, self._go = (os.open(name, os.O_RDWR) for name in names)
        before = "echo > {}; read line < {}".format(*(shlex.quote(str(name)) for name in names))
        here.use(copying_compiler(here.path / "gated", here.real, here.log, before))

    def wait(self) -> None:
        os.read(self._started, 1)

    def open(self) -> None:
        os.write(self._go, b"\n" * 50)

    def close(self) -> None:
        os.close(self._started)
        os.close(self._go)


class Hanging:
    """A compiler that hangs, and so does a process that it started."""

    def __init__(self, here: Here) -> None:
        alive, never = here.path / "alive", here.path / "never"
        os.mkfifo(alive)
        os.mkfifo(never)
        self._alive = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(self._alive, True)
        self._writer = os.open(alive, os.O_WRONLY)
        here.use(
            program(here.path / "hangs", f"exec 9> '{alive}'; echo >&9; timeout --foreground 600 cat '{never}'; echo")
        )

    def wait(self) -> None:
        """Wait until it runs."""
        os.read(self._alive, 1)

    def wait_for_death(self) -> None:
        """Wait until the compiler and what it started are dead, which closes the last writing end of the FIFO."""
        os.close(self._writer)
        while os.read(self._alive, 1):
            pass
        os.close(self._alive)


def in_child(function: Callable[..., Any]) -> int:
    """Run a function in a forked process, whose status is 0 if it returned and 1 if it raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 on: forking while torch has threads
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts behind ignore this
        function()
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(status)


def status_of(pid: int) -> int:
    """Wait for a child: its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def failing(
    function: Callable[..., Any], failure: Failure, nth: int = 1, under: Path | None = None
) -> Callable[..., Any]:
    """A stand-in for an os function whose nth call (on a path under a directory, if one is given) fails."""
    calls = 0

    def stand_in(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if under is None or str(arguments[0]).startswith(str(under)):
            calls += 1
            if calls == nth:
                failure()
        return function(*arguments, **options)

    return stand_in


def read_only(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Root may write anywhere, so the system calls have to say no."""

    def deny(function: Callable[..., Any], denied: Callable[[tuple[Any, ...]], object]) -> Callable[..., Any]:
        def stand_in(*arguments: Any, **options: Any) -> Any:
            if str(arguments[0]).startswith(str(directory)) and denied(arguments):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return function(*arguments, **options)

        return stand_in

    monkeypatch.setattr(os, "open", deny(os.open, lambda arguments: arguments[1] & (os.O_WRONLY | os.O_RDWR)))
    for name in ("rename", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, deny(getattr(os, name), lambda _: True))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def flip_bit(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.unlink()
    path.write_bytes(data)


def rewrite(manifest: Path, drop: Sequence[str] = (), **changes: object) -> None:
    """Change a manifest as somebody would who knows how it is sealed."""
    fields = {**json.loads(manifest.read_bytes()), **changes}
    del fields["digest"]
    for name in drop:
        del fields[name]
    fields["digest"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(fields))


class Planted:
    """Unpickling this leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def replaced(make: Damage) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def _linked(path: Path) -> None:
    os.rename(path, path.parent.parent / path.name)
    os.symlink(path.parent.parent / path.name, path)


def _escaping(path: Path) -> None:
    (path.parent / f"{KEY}-").mkdir()  # makes the name below one that exists
    rewrite(path, sha256="/../../secret")


def _of_another_key(path: Path) -> None:
    rewrite(path, key=OTHER_KEY)
    library = next(path.parent.glob("*.so"))
    shutil.copy(library, library.with_name(library.name.replace(KEY, OTHER_KEY)))


def _sparse(path: Path) -> None:
    os.truncate(path, 2**40)


# Each is done to the manifest and to the library.
FILE_DAMAGE: dict[str, Damage] = {
    "empty": lambda path: os.truncate(path, 0),
    "garbage": lambda path: path.write_bytes(os.urandom(4000)),
    "directory": replaced(os.mkdir),
    "FIFO": replaced(os.mkfifo),
    "sparse": _sparse,
    "linked": _linked,
    "hard linked": lambda path: os.link(path, path.parent.parent / "other name"),
    "group can write": lambda path: path.chmod(0o620),
    "world can write": lambda path: path.chmod(0o602),
    "foreign owner": lambda path: os.chown(path, 12345, -1),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Planted(path.parent.parent / "marker"))),
}
MANIFEST_DAMAGE: dict[str, Damage] = {
    "extra key": lambda path: rewrite(path, surprise=1),
    "missing key": lambda path: rewrite(path, drop=["facts"]),
    "not an object": lambda path: path.write_text("[]"),
    "nested too deep": lambda path: path.write_text("[" * 500_000),
    "other schema": lambda path: rewrite(path, schema=0),
    "other key": _of_another_key,
    "wrong hash": lambda path: rewrite(path, sha256=json.loads(path.read_bytes())["sha256"][:16] + "0" * 48),
    "hash with ..": _escaping,
    "hash of another type": lambda path: rewrite(path, sha256=7),
    "size of another type": lambda path: rewrite(path, size="1"),
    "size too small": lambda path: rewrite(path, size=100),
    "size negative": lambda path: rewrite(path, size=-1),
    "size too large": lambda path: rewrite(path, size=2**40),
    "library missing": lambda path: next(path.parent.glob("*.so")).unlink(),
    "other key's library": lambda path: shutil.copy(path.parent.parent / "other.so", next(path.parent.glob("*.so"))),
}
DAMAGE = [
    *((f"{part}: {name}", part, damage) for part in ("manifest", "library") for name, damage in FILE_DAMAGE.items()),
    *((f"manifest: {name}", "manifest", damage) for name, damage in MANIFEST_DAMAGE.items()),
]


def _link_directory(cache: Path) -> None:
    os.rename(cache, cache.with_name("real"))
    cache.symlink_to(cache.with_name("real"))


def _file_for_directory(cache: Path) -> None:
    shutil.rmtree(cache)
    cache.touch()


def _give_away(path: Path) -> None:
    os.chown(path, 12345, -1)


def _give_away_sticky(path: Path) -> None:
    path.chmod(0o1777)
    _give_away(path)


# Each lets somebody else exchange what is in a directory.
PARENT_DAMAGE: dict[str, tuple[Damage, str]] = {
    "world can write": (lambda parent: parent.chmod(0o777), "can be replaced by others, .*mode 777"),
    "group can write": (lambda parent: parent.chmod(0o775), "can be replaced by others, .*mode 775"),
    "foreign": (_give_away, "can be replaced by others, .* belongs to user 12345"),
    "foreign and sticky": (_give_away_sticky, "can be replaced by others, .* belongs to user 12345"),
}


def _of_parent(damage: Damage) -> Damage:
    return lambda cache: damage(cache.parent)


DIRECTORY_DAMAGE: dict[str, tuple[Damage, str]] = {
    "foreign owner": (lambda cache: os.chown(cache, 12345, -1), "belongs to user 12345"),
    "group can write": (lambda cache: cache.chmod(0o770), "mode 770"),
    "world can write": (lambda cache: cache.chmod(0o707), "mode 707"),
    "link": (_link_directory, "is a link"),
    "file": (_file_for_directory, "expected a directory"),
    **{f"parent: {name}": (_of_parent(damage), message) for name, (damage, message) in PARENT_DAMAGE.items()},
}
BAD_COMPILERS: dict[str, tuple[str, type[Exception], str]] = {
    "fails": ("echo 'x.cpp:1: error: }' >&2; exit 1", RuntimeError, r"status 1: .*-shared[^\n]*\nx.cpp:1: error: }"),
    "prints garbage": (r"head -c 100000 /dev/urandom; printf '\033[2J'; exit 3", RuntimeError, "status 3"),
    "is killed": ("kill -9 $$", RuntimeError, "status -9"),
    "writes nothing": ("exit 0", RuntimeError, "wrote no library"),
    "writes an empty file": (': > "$output"', RuntimeError, "wrote no library"),
    "writes garbage": ('echo hello > "$output"', OSError, "library.so: file too short"),
    "cannot start": ("#!/absent", RuntimeError, r"status 12[67]: .*\n.*not found"),
}


FLAGS = ("-O1",)
Patch = pytest.MonkeyPatch


class Entry(NamedTuple):
    manifest: Path
    library: Path


def load(path: Path) -> int:
    return int(ctypes.CDLL(str(path)).answer())


def begin(key: str = KEY, load: Callable[[Path], Any] = load, facts: Any = None, **options: Any) -> native.Future[Any]:
    source = native.Source(SOURCE, FLAGS, facts or {})
    return native.Future(native.Library(key, lambda: source, load), **options)


def obtain(key: str = KEY, load: Callable[[Path], Any] = load, facts: Any = None) -> native.Loaded[Any]:
    return begin(key, load, facts).result()


def opened() -> store.Store:
    found = store.open_store()
    assert found is not None
    return found


def found_compiler(*, named: bool = True) -> compiler.Compiler:
    """The one that CXX names, or that of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        if not named:
            patch.delenv("CXX", raising=False)
        found = compiler.find_compiler()
    assert found is not None
    return found


def find(fingerprint: str | None = None) -> Any:
    """The facts of an entry that is found whole."""
    found = opened().load(KEY, fingerprint, lambda path: path)
    return None if found is None else found[1]


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in directory.iterdir()}
