"""Find the C++ compiler and run it, without ever hanging or leaving anything behind."""

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
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from compiled_optim._engine.cache.trust import directory_problem

_PREFIX = "compiled_optim-build-"
_SHOWN_BYTES = 4096
_SHOWN_LINES = 12
# Runs a command in a process group in which all are killed when the standard input ends.
_WATCHED = 'exec 3<&0; { read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 & exec "$@" </dev/null 3<&-'


class BuildError(RuntimeError):
    """The C++ compiler gave no library; the message has its command and the first lines it printed."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its path, arguments that always come first, and what tells it from another version of itself."""

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
    """`ccache g++` is two programs, and either may be upgraded; any other word stands for itself."""
    program = shutil.which(word)
    if program is None:
        return word
    real = os.path.realpath(program)
    status = os.stat(real)
    return f"{real} {status.st_size} {status.st_mtime_ns}"


@contextmanager
def private_directory() -> Iterator[Path]:
    """A new directory that only this user can enter, removed at exit; those of killed processes are removed first.

    Raises:
        BuildError: there is no place for temporary files, or others could exchange the directory.
    """
    owner = os.getpid()
    try:
        temporary = Path(tempfile.gettempdir()).resolve()
        _sweep(temporary)
        path, lock = _locked_directory(temporary)
        problem = directory_problem(path)
    except OSError as error:
        raise BuildError(f"no private directory to compile in: {error}") from error
    try:
        if problem is not None:
            raise BuildError(
                f"no private directory to compile in: {problem}. Set TMPDIR to one that only you can write"
            )
        yield path
    finally:
        if os.getpid() == owner:  # a forked child unwinds a copy of this frame, but the directory is its parent's
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _locked_directory(parent: Path) -> tuple[Path, int]:
    """A new directory, and a descriptor that has it locked for as long as this process lives."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        os.chmod(path, 0o700)  # an odd umask takes bits from the owner, too
        with suppress(FileNotFoundError, BlockingIOError):  # swept before it was locked
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _lock(lock)
                os.stat(path)
            except BaseException:
                os.close(lock)
                raise
            return path, lock


def _lock(directory: int) -> None:
    """Locks it; raises BlockingIOError if another process has. Where locks do not work, nothing is swept either."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


def _sweep(parent: Path) -> None:
    """Removes what `private_directory` made for processes that were killed."""
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.geteuid():
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


class Build:
    """A compiler at work. Call `wait()`, and `stop()` when the result is no longer wanted."""

    def __init__(self, command: list[str], output: Path, seconds: float) -> None:
        self.output = output
        self._owner = os.getpid()
        self._command = shlex.join(command)
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._log = output.with_suffix(".log")
        # The compiler's own temporary files belong in the private directory: one that is killed cannot remove them.
        environment = {**os.environ, "TMPDIR": str(output.parent)}
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with open(self._log, "xb") as log, _uninterrupted():
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", _WATCHED, "sh", *command],
                    stdin=subprocess.PIPE,  # ends when this process does
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # so that a compiler is killed together with what it started
                )
                weakref.finalize(self, _kill, self._process)  # for a caller interrupted before it can call `stop`
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        """Wait until the library is at `output`.

        Raises:
            BuildError: the compiler failed, took too long, wrote no library, or was started before this process forked.
        """
        if os.getpid() != self._owner:
            raise BuildError(f"compiler was started by process {self._owner}, not by this one: {self._command}")
        assert self._process is not None
        try:
            status = self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise self._error(f"took longer than {self._seconds:g} s") from None
        finally:
            self.stop()
        if status != 0:
            raise self._error(f"failed with status {status}")
        if not self.output.is_file() or self.output.stat().st_size == 0:
            raise self._error("reported success but wrote no library")

    def stop(self) -> None:
        """Kill the compiler and all it started, if it still runs."""
        if self._process is not None:
            _kill(self._process)

    def _error(self, problem: str) -> BuildError:
        printed = b""
        with suppress(OSError), open(self._log, "rb") as log:
            printed = log.read(_SHOWN_BYTES)
        lines = printed.decode(errors="replace").expandtabs().splitlines()[:_SHOWN_LINES]
        shown = "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)
        return BuildError(f"compiler {problem}: {self._command}\n{shown}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    if process.poll() is None:  # never so in a forked child, whose process this is not
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # in an uninterruptible wait even SIGKILL may take for ever
            process.wait(5)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C until the end: an interrupt inside Popen would lose sight of a process that has started."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is None or threading.current_thread() is not threading.main_thread():  # Python handles no signals here
        yield
        return
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught:
            signal.raise_signal(signal.SIGINT)


def start_build(compiler: Compiler, source: str, flags: Sequence[str], output: Path, seconds: float = 300) -> Build:
    """Start compiling a shared library.

    Args:
        compiler: the compiler to run.
        source: C++ code; it is written next to `output`.
        flags: come after the source, so that libraries among them are searched for its symbols.
        output: the library to write, in a directory of its own (see `private_directory`).
        seconds: how long the compiler may take.

    Raises:
        BuildError: the compiler cannot be started.
    """
    text = output.with_suffix(".cpp")
    command = [compiler.path, *compiler.arguments, "-shared", "-fPIC", str(text), *flags, "-o", str(output)]
    try:
        text.write_text(source, encoding="utf-8")
        return Build(command, output, seconds)
    except OSError as error:
        raise BuildError(f"compiler cannot be started ({error}): {shlex.join(command)}") from error


def build(compiler: Compiler, source: str, flags: Sequence[str], output: Path, seconds: float = 300) -> None:
    """Compile a shared library and wait for it: `start_build(...).wait()`.

    Raises:
        BuildError: the compiler cannot be started, failed, took too long or wrote no library.
    """
    start_build(compiler, source, flags, output, seconds).wait()
