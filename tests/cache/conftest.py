"""An empty cache, a compiler that copies, and the traps around each test of the cache."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from fault_tools import (
    FLAGS,
    KEY,
    SOURCE,
    Entry,
    Gate,
    Here,
    Patch,
    found_compiler,
    obtain,
)

from compiled_optim._engine.cache import compiler, store


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library compiled once by the compiler of this machine."""
    output = tmp_path_factory.mktemp("real") / "real.so"
    compiler.compile_library(found_compiler(), SOURCE, FLAGS, output)
    return output


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: Patch, real: Path) -> Iterator[Here]:
    """An empty cache and a fast compiler. Afterwards nothing temporary may be left, and no test may hang."""
    here = Here(tmp_path, real, monkeypatch)
    for name, value in vars(store.Counters()).items():
        monkeypatch.setattr(store.counters, name, value)

    def too_late(*_: object) -> NoReturn:
        raise TimeoutError("the test hangs")

    previous = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(300)
    yield here
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    assert os.listdir(here.temporary) == []
    assert not list(here.cache.glob("*.tmp"))


@pytest.fixture
def entry(here: Here) -> Entry:
    """A published entry, and the paths of its files; not loaded, since damage to a mapped file kills a process."""
    obtain(load=lambda _: None)
    (library,) = here.cache.glob("*.so")
    return Entry(here.cache / f"{KEY}.json", library)


@pytest.fixture
def gate(here: Here) -> Iterator[Gate]:
    gate = Gate(here)
    yield gate
    gate.close()
