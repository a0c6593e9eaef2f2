"""Writers: concurrent, interrupted, out of space, without a compiler. A failure is but a miss."""

import atexit
import errno
import fcntl
import itertools
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import fault_tools
import pytest
import torch
from fault_tools import (
    BAD_COMPILERS,
    FLAGS,
    KEY,
    OTHER_KEY,
    PARENT_DAMAGE,
    SOURCE,
    Damage,
    Entry,
    Gate,
    Here,
    Patch,
    begin,
    contents,
    find,
    found_compiler,
    in_child,
    load,
    obtain,
    opened,
    program,
    status_of,
)

from compiled_optim._engine import settings
from compiled_optim._engine.cache import compiler, native, store
from compiled_optim._engine.kernels import registry


def test_processes_on_one_cold_key_build_once(here: Here, gate: Gate) -> None:
    read_end, write_end = os.pipe()

    def work() -> None:
        pending = begin()
        os.write(write_end, b".")
        assert pending.result().value == 42

    children = [in_child(work) for _ in range(8)]
    for _ in children:
        os.read(read_end, 1)  # all have begun while the one compiler still waits
    gate.open()
    assert [status_of(child) for child in children] == [0] * 8
    assert here.builds() == 1
    for descriptor in (read_end, write_end):
        os.close(descriptor)


def test_threads_on_one_cold_key_build_once(here: Here, gate: Gate) -> None:
    ready = threading.Barrier(9)

    def work(_: object) -> int:
        pending = begin()
        ready.wait(300)
        return pending.result().value

    with ThreadPoolExecutor(8) as pool:
        values = pool.map(work, range(8))
        ready.wait(300)
        gate.open()
        assert list(values) == [42] * 8
    assert here.builds() == 1


def test_two_libraries_are_compiled_at_once(here: Here, gate: Gate) -> None:
    both = [begin(KEY), begin(OTHER_KEY)]
    gate.wait()
    gate.wait()
    gate.open()
    assert [pending.result().value for pending in both] == [42, 42]
    assert both[0].result() is both[0].result()
    assert not both[0].failed


def test_stopped_lock_holder(here: Here, monkeypatch: Patch) -> None:
    monkeypatch.setattr(native, "LOCK_SECONDS", 0.1)
    monkeypatch.setattr(time, "time", itertools.count(1e9, -3600).__next__)  # a clock that is set back again and again

    def hold() -> None:
        with opened().writer(KEY) as held:
            assert held
            os.kill(os.getpid(), signal.SIGSTOP)

    child = in_child(hold)
    os.waitpid(child, os.WUNTRACED)
    try:
        result = obtain()
        assert (result.value, result.origin, store.counters.errors) == (42, "compiled", 1)
        assert find() is None
    finally:
        os.kill(child, signal.SIGCONT)
    assert status_of(child) == 0
    obtain()
    assert find() is not None


def test_locks_that_do_not_work(monkeypatch: Patch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert obtain().value == 42
    assert find() is None
    assert store.counters.errors == 1


PUBLISHING = [(name, nth) for name in ("open", "fchmod", "write", "fsync", "rename") for nth in (1, 2)]


def obtain_failing(
    here: Here, monkeypatch: Patch, name: str, nth: int, failure: Callable[[], object]
) -> native.Loaded[int]:
    """Obtain a library, but the nth call of an os function by `publish` fails."""

    def produce() -> native.Source:
        under = here.cache if name in ("open", "rename") else None  # these are called elsewhere, too
        monkeypatch.setattr(os, name, fault_tools.failing(getattr(os, name), failure, nth, under))
        return native.Source(SOURCE, FLAGS)

    return native.get(native.Library(KEY, produce, load))


@pytest.mark.parametrize(("name", "nth"), PUBLISHING)
def test_writer_killed_while_publishing(here: Here, monkeypatch: Patch, name: str, nth: int) -> None:
    child = in_child(lambda: obtain_failing(here, monkeypatch, name, nth, fault_tools.die))
    assert status_of(child) == -signal.SIGKILL
    assert find() is None
    assert [obtain().origin for _ in range(2)] == ["compiled", "disk"]
    assert store.counters == store.Counters()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize(("name", "nth"), PUBLISHING)
def test_failure_while_publishing(here: Here, monkeypatch: Patch, name: str, nth: int, number: int) -> None:
    def fail() -> NoReturn:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        result = obtain_failing(here, patch, name, nth, fail)
    assert (result.value, result.origin, store.counters.errors) == (42, "compiled", 1)
    assert os.strerror(number) in store.counters.reasons[0]
    assert not list(here.cache.glob("*.tmp"))
    assert find() is None
    assert [obtain().origin for _ in range(2)] == ["compiled", "disk"]


def test_child_forked_while_compiling_disturbs_nothing(here: Here, gate: Gate) -> None:
    pending = begin()
    gate.wait()

    def work() -> None:
        assert pending.failed
        with pytest.raises(compiler.BuildError, match="not by this one"):
            pending.result()
        pending.cancel()
        with opened().writer(KEY) as held:
            assert not held

    assert status_of(in_child(work)) == 0
    gate.open()
    assert pending.result().value == 42
    assert find() is not None


def test_child_forked_while_compiling_exits(here: Here, gate: Gate) -> None:
    """With the handlers that its parent has registered for its own exit."""
    pending = begin()
    gate.wait()
    assert status_of(in_child(atexit._run_exitfuncs)) == 0
    gate.open()
    assert pending.result().value == 42


def test_cancelled_while_compiling(here: Here, gate: Gate) -> None:
    pending = begin()
    gate.wait()
    pending.cancel()
    assert os.listdir(here.temporary) == []
    with opened().writer(KEY) as held:
        assert held
    with pytest.raises(compiler.BuildError, match="was cancelled"):
        pending.result()


def test_cancelled_while_another_writer_is_waited_for() -> None:
    with opened().writer(KEY) as held:
        assert held
        pending = begin()
        pending.underway.wait()
        pending.cancel()
        assert pending.failed
        impatient = begin(wait=False)
        with pytest.raises(compiler.BuildError, match="by another writer"):
            impatient.result()
    assert obtain().value == 42


EXITING = """
import sys
sys.path.insert(0, {tests!r})
import fault_tools
fault_tools.begin().underway.wait()
assert sys.stdin.read(1) == "."
"""


def test_process_that_exits_while_compiling_leaves_nothing(here: Here) -> None:
    hanging = fault_tools.Hanging(here)
    process = subprocess.Popen(
        [sys.executable, "-c", EXITING.format(tests=str(Path(__file__).parent))],
        env={**os.environ, "TMPDIR": str(here.temporary)},
        stdin=subprocess.PIPE,
    )
    hanging.wait()
    process.communicate(b".")
    assert process.returncode == 0
    hanging.wait_for_death()
    assert os.listdir(here.temporary) == os.listdir(here.cache) == []


def test_unreadable_entry_is_left_alone(here: Here, entry: Entry, monkeypatch: Patch) -> None:
    def fail() -> NoReturn:
        raise OSError(errno.EMFILE, "too many open files")

    before = contents(here.cache)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fault_tools.failing(os.open, fail, under=here.cache))
        assert find() is None
    assert (store.counters.bad, store.counters.errors) == (0, 1)
    assert contents(here.cache) == before
    assert obtain().origin == "disk"


def test_read_only(here: Here, entry: Entry, monkeypatch: Patch) -> None:
    fault_tools.read_only(monkeypatch, here.cache)
    assert obtain().origin == "disk"
    assert obtain(OTHER_KEY).value == 42
    assert (store.counters.bad, store.counters.errors) == (0, 1)


def test_read_only_and_damaged(here: Here, entry: Entry, monkeypatch: Patch) -> None:
    fault_tools.flip_bit(entry.library, 1000, 3)
    fault_tools.read_only(monkeypatch, here.cache)
    assert obtain().value == 42
    assert store.counters.bad > 0


def test_read_only_without_a_directory(here: Here, monkeypatch: Patch) -> None:
    fault_tools.read_only(monkeypatch, here.cache)
    with pytest.warns(store.CacheWarning, match=os.strerror(errno.EROFS)):
        assert obtain().value == 42


@pytest.mark.parametrize(("body", "error", "message"), BAD_COMPILERS.values(), ids=BAD_COMPILERS)
def test_bad_compiler(here: Here, body: str, error: type[Exception], message: str) -> None:
    good = os.environ["CXX"]
    here.use(program(here.path / "bad", body))
    with pytest.raises(error, match=message) as caught:
        obtain()
    assert str(caught.value).replace("\n", "").isprintable()
    assert len(str(caught.value)) < 6000
    assert find() is None
    here.use(good)
    assert obtain().value == 42


def test_compiler_that_hangs(here: Here) -> None:
    hanging = fault_tools.Hanging(here)
    with compiler.private_directory() as private, pytest.raises(compiler.BuildError, match=r"longer than 0\.3 s"):
        compiler.compile_library(found_compiler(), SOURCE, FLAGS, private / "library.so", seconds=0.3)
    hanging.wait_for_death()


@pytest.mark.parametrize("moment", ["starting", "waiting"])
def test_interrupt_while_compiling(here: Here, monkeypatch: Patch, moment: str) -> None:
    start = subprocess.Popen

    def start_interrupted(*arguments: Any, **options: Any) -> Any:
        process = start(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)
        return process

    def work() -> None:
        if moment == "starting":
            monkeypatch.setattr(subprocess, "Popen", start_interrupted)
        with pytest.raises(KeyboardInterrupt):
            obtain()
        assert os.listdir(here.temporary) == []

    hanging = fault_tools.Hanging(here)
    child = in_child(work)
    if moment == "waiting":
        hanging.wait()
        os.kill(child, signal.SIGINT)
    assert status_of(child) == 0
    hanging.wait_for_death()
    assert list(here.cache.iterdir()) == []


@pytest.mark.parametrize("call", [registry.get, registry.prefetch])
def test_kernel_that_is_not_lowered_stops_the_compilers_of_others(
    here: Here, monkeypatch: Patch, call: Callable[[Any], object]
) -> None:
    hanging = fault_tools.Hanging(here)

    def produce() -> NoReturn:
        hanging.wait()
        raise ValueError("not lowered")

    class Wanted:
        name = "wanted"

    host = native.Library(KEY, lambda: native.Source(SOURCE, FLAGS), load)
    monkeypatch.setattr(registry, "_host", None)
    monkeypatch.setattr(registry, "_host_library", lambda: host)
    monkeypatch.setattr(registry, "_library", lambda *_: native.Library(OTHER_KEY, produce, load))
    with pytest.raises(ValueError, match="not lowered") if call is registry.get else nullcontext():
        call([Wanted()])
    hanging.wait_for_death()
    assert list(here.cache.iterdir()) == []


def test_killed_while_compiling(here: Here) -> None:
    """Its compiler dies with it, and the next process that compiles removes what it left."""
    good = os.environ["CXX"]
    hanging = fault_tools.Hanging(here)
    child = in_child(obtain)
    hanging.wait()
    os.kill(child, signal.SIGKILL)
    assert status_of(child) == -signal.SIGKILL
    hanging.wait_for_death()
    (left,) = here.temporary.iterdir()
    assert [path.name for path in here.cache.iterdir()] == [f"{KEY}.lock"]
    with compiler.private_directory() as alive:
        here.use(good)
        assert obtain(OTHER_KEY).value == 42
        assert alive.exists()
    assert not left.exists()
    assert {path.stem[:32] for path in here.cache.iterdir()} == {OTHER_KEY}


def test_no_place_for_temporary_files(here: Here, monkeypatch: Patch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(here.path / "absent"))
    with pytest.raises(compiler.BuildError, match="no private directory"):
        obtain()


@pytest.mark.parametrize(("damage", "message"), PARENT_DAMAGE.values(), ids=PARENT_DAMAGE)
def test_temporary_directory_that_others_could_exchange(here: Here, damage: Damage, message: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    damage(here.temporary)
    with pytest.raises(compiler.BuildError, match=message):
        obtain()
    here.temporary.chmod(0o1777)
    os.chown(here.temporary, os.geteuid(), -1)
    assert obtain().value == 42


@pytest.mark.parametrize("name", ["with space", "ünï-cødé-目", "-dash", "new\nline", "quo'te\"$(x)"])
def test_odd_paths(here: Here, monkeypatch: Patch, name: str) -> None:
    odd = here.path / name
    odd.mkdir()
    monkeypatch.delenv("CXX")
    compiler = odd / "c++"
    compiler.symlink_to(found_compiler().path)
    here.use(compiler)
    monkeypatch.setenv("COMPILED_OPTIM_CACHE_DIR", str(odd / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    assert [obtain().origin for _ in range(2)] == ["compiled", "disk"]


def test_compiler_is_looked_for(here: Here, monkeypatch: Patch, tmp_path: Path) -> None:
    for name in ("g++", "clang++"):
        program(tmp_path / name, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX")
    assert found_compiler().path == str(tmp_path / "g++")
    (tmp_path / "g++").unlink()
    found = found_compiler()
    assert found.path == str(tmp_path / "clang++")
    program(tmp_path / "clang++", "# upgraded")
    assert found_compiler().fingerprint != found.fingerprint
    program(tmp_path / "ccache", "")
    monkeypatch.setenv("CXX", "ccache clang++ -m64")
    wrapped = found_compiler()
    assert (wrapped.path, wrapped.arguments) == (str(tmp_path / "ccache"), ("clang++", "-m64"))
    program(tmp_path / "clang++", "# upgraded again")
    assert found_compiler().fingerprint != wrapped.fingerprint
    for missing in ("absent", "g++ 'open quotation"):
        monkeypatch.setenv("CXX", missing)
        assert compiler.find_compiler() is None


def test_cache_directory(monkeypatch: Patch, tmp_path: Path) -> None:
    assert settings.cache_directory() == tmp_path / "cache"
    monkeypatch.setenv("COMPILED_OPTIM_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(settings.cache_directory()) == "/xdg/compiled_optim"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(settings.cache_directory()) == "/home/me/.cache/compiled_optim"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert settings.cache_directory() is None
    with pytest.warns(store.CacheWarning, match="no home directory"):
        assert store.open_store() is None


def test_switches(monkeypatch: Patch) -> None:
    for name, function, default in [
        ("COMPILED_OPTIM_DISK_CACHE", settings.disk_cache, True),
        ("COMPILED_OPTIM_DISABLE", settings.disabled, False),
        ("COMPILED_OPTIM_STRICT", settings.strict, False),
    ]:
        for value, expected in [("", default), ("0", False), ("False", False), ("1", True), ("true", True)]:
            monkeypatch.setenv(name, value)
            assert function() is expected
        monkeypatch.setenv(name, "maybe")
        with pytest.raises(ValueError, match=f"{name}='maybe'"):
            function()
    for value, size in [("", 2**28), ("0", 0), ("90000", 90000), ("3K", 3072), ("2M", 2**21), ("1G", 2**30)]:
        monkeypatch.setenv("COMPILED_OPTIM_CACHE_LIMIT", value)
        assert settings.cache_limit() == size
    for value in ("-1", "1.5M", "1MB", "M", "many"):
        monkeypatch.setenv("COMPILED_OPTIM_CACHE_LIMIT", value)
        with pytest.raises(ValueError, match=f"COMPILED_OPTIM_CACHE_LIMIT='{value}'"):
            settings.cache_limit()


def test_machine_key(monkeypatch: Patch) -> None:
    def key(*parts: str) -> str:
        native._machine.cache_clear()
        return native.machine_key(*parts)

    keys = [key("a", "bc"), key("ab", "c"), key("abc")]
    for target, name in [(torch, "__version__"), (torch.version, "git_version"), (sys, "platform")]:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, "other")
            keys.append(key("abc"))
    for name, value in [("__version__", "other"), ("SCHEMA", 0)]:
        with monkeypatch.context() as patch:
            patch.setattr(native, name, value)
            keys.append(key("abc"))
    assert len(set(keys)) == len(keys)
    assert key("abc") == keys[2]
    command = "from compiled_optim._engine.cache import native; print(native.machine_key('abc'))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    printed = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == [keys[2]]
