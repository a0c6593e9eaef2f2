"""Finds the C++ compiler and runs it. It neither hangs nor outlives this process nor leaves files behind."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from compiled_optim._engine.cache.trust import directory_problem

_PREFIX = "compiled_optim-build-"
_SHOWN_BYTES = 4096
_SHOWN_LINES = 12
_POLL_SECONDS = 0.02
# Runs a command and kills its process group when the standard input ends.
_WATCHED = 'exec 3<&0; { read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 & exec "$@" </dev/null 3<&-'


class BuildError(RuntimeError):
    """A compiler made no library, or the driver of a device takes none. The message is that of the one that failed."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its path, the arguments that come first, and a fingerprint of its version."""

    path: str
    arguments: tuple[str, ...]
    fingerprint: str


def find_compiler() -> Compiler | None:
    """The compiler named by `CXX` (which may carry arguments), else g++, else clang++; None if there is none.

    Runs nothing: the fingerprint is made of the real path, size and modification time of each program in the command.
    """
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "clang++"]:
        with suppress(OSError, ValueError):  # deleted meanwhile; CXX with an open quotation mark
            words = [command] if shutil.which(command) else shlex.split(command)
            path = shutil.which(words[0]) if words else None
            if path is not None:
                path = os.path.abspath(path)
                return Compiler(path, tuple(words[1:]), " ".join([_identity(path), *map(_identity, words[1:])]))
    return None


def _identity(word: str) -> str:
    """Identifies one word of the command: a program by its file, which an upgrade changes; any other word by itself."""
    program = shutil.which(word)
    if program is None:
        return word
    real = os.path.realpath(program)
    status = os.stat(real)
    return f"{real} {status.st_size} {status.st_mtime_ns}"


@contextmanager
def private_directory() -> Iterator[Path]:
    """A new directory that only this user can enter, removed at exit. First removes those of killed processes.

    Raises:
        BuildError: there is no place for temporary files, or another user could replace the directory.
    """
    try:
        temporary = Path(tempfile.gettempdir()).resolve()
        _sweep(temporary)
        path, lock = _locked_directory(temporary)
    except OSError as error:
        raise BuildError(f"no private directory to compile in: {error}") from error
    try:
        problem = directory_problem(path)
        if problem is not None:
            raise BuildError(
                f"no private directory to compile in: {problem}. Set TMPDIR to one that only you can write"
            )
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _locked_directory(parent: Path) -> tuple[Path, int]:
    """A new directory, and a descriptor that locks it for as long as this process lives."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        os.chmod(path, 0o700)  # whatever the umask
        with suppress(FileNotFoundError):  # another process swept it before it was locked
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # where locks do not work, nothing is swept either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _sweep(parent: Path) -> None:
    """Removes directories that killed processes left, whose locks are free."""
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.geteuid():
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def compile_library(
    compiler: Compiler,
    source: str,
    flags: Sequence[str],
    output: Path,
    cancelled: threading.Event | None = None,
    seconds: float = 300,
) -> None:
    """Compiles a shared library and waits for it, unless `cancelled` is set or `seconds` have passed before.

    The compiler and everything that it starts are dead afterwards, and they die with this process if that is killed.
    Call it in a thread that handles no signals: an exception inside `Popen` would lose sight of a started process.

    Args:
        compiler: the compiler to run.
        source: C++ code; it is written next to `output`.
        flags: come after the source, so that libraries among them are searched for its symbols.
        output: the library to write, in a directory of its own (see `private_directory`).

    Raises:
        BuildError: the compiler cannot be started, failed, was stopped or wrote no library.
    """
    text, log = output.with_suffix(".cpp"), output.with_suffix(".log")
    command = [compiler.path, *compiler.arguments, "-shared", "-fPIC", str(text), *flags, "-o", str(output)]
    cancelled = cancelled or threading.Event()
    try:
        text.write_text(source, encoding="utf-8")
        with open(log, "xb") as printed:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHED, "sh", *command],
                stdin=subprocess.PIPE,  # ends when this process does
                stdout=printed,
                stderr=subprocess.STDOUT,
                # A killed compiler cannot remove its temporary files, so they belong in the private directory.
                env={**os.environ, "TMPDIR": str(output.parent)},
                start_new_session=True,  # a process group, so that a compiler is killed together with what it started
            )
    except OSError as error:
        raise BuildError(f"compiler cannot be started ({error}): {shlex.join(command)}") from error
    deadline = time.monotonic() + seconds
    while (status := process.poll()) is None and time.monotonic() < deadline and not cancelled.wait(_POLL_SECONDS):
        pass
    _kill(process)
    if status == 0 and output.is_file() and output.stat().st_size > 0:
        return
    if status is None:
        problem = "was cancelled" if cancelled.is_set() else f"took longer than {seconds:g} s"
    else:
        problem = "reported success but wrote no library" if status == 0 else f"failed with status {status}"
    raise BuildError(f"compiler {problem}: {shlex.join(command)}\n{_shown(log)}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    if process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # even SIGKILL does not end an uninterruptible wait
            process.wait(5)


def _shown(log: Path) -> str:
    """The first lines of what a compiler printed, without control characters."""
    with open(log, "rb") as file:
        lines = file.read(_SHOWN_BYTES).decode(errors="replace").expandtabs().splitlines()[:_SHOWN_LINES]
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)
