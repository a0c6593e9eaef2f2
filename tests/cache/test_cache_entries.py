"""What is loaded from disk is mine and whole: damage and distrust are misses."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import fault_tools
import pytest
from fault_tools import (
    DAMAGE,
    DIRECTORY_DAMAGE,
    KEY,
    OTHER_KEY,
    SOURCE,
    Damage,
    Entry,
    Here,
    Patch,
    contents,
    find,
    found_compiler,
    load,
    obtain,
    opened,
)

from compiled_optim._engine.cache import compiler, native, store, tidy

KEYS = [digit * 32 for digit in "0123456"]


def test_compiled_once_then_read_without_writing(here: Here) -> None:
    first = obtain(facts={"order": ["p", "g"], "count": 2, "limit": 0.1})
    before = contents(here.cache)
    second = obtain(facts={"order": []})
    assert (first.value, first.origin, second.value, second.origin) == (42, "compiled", 42, "disk")
    assert first.facts == second.facts == {"order": ["p", "g"], "count": 2, "limit": 0.1}
    assert first.seconds > 0
    assert second.seconds > 0
    assert contents(here.cache) == before
    assert find() == first.facts
    assert here.builds() == 1
    assert store.counters == store.Counters()


def test_another_compiler_is_a_miss_and_none_is_a_hit(here: Here, entry: Entry) -> None:
    here.use(fault_tools.copying_compiler(here.path / "newer", here.real, here.log))
    assert obtain().origin == "compiled"
    assert here.builds() == 2
    here.use(here.path / "absent")
    assert obtain().origin == "disk"
    with pytest.raises(native.NoCompilerError, match=r"install g\+\+"):
        obtain(OTHER_KEY)
    assert store.counters.bad == 0


def test_switched_off(here: Here, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COMPILED_OPTIM_DISK_CACHE", "0")
    assert [obtain().origin for _ in range(2)] == ["compiled", "compiled"]
    assert not here.cache.exists()


def test_clear_removes_only_our_files(here: Here, entry: Entry, monkeypatch: Patch) -> None:
    (here.cache / "notes.json").touch()
    (here.cache / f"{KEY}.json.bad").touch()
    (here.cache / f"{KEY}.json.{'0' * 16}.tmp").touch()
    names = [*os.listdir(here.cache), f"{OTHER_KEY}.json"]  # the last one has just been deleted by somebody else
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda _: names)
        opened().clear()
    assert [path.name for path in here.cache.iterdir()] == ["notes.json"]


@pytest.mark.parametrize(("part", "damage"), [pytest.param(*case, id=name) for name, *case in DAMAGE])
def test_bad_entry_is_set_aside_once_and_rebuilt(here: Here, entry: Entry, part: str, damage: Damage) -> None:
    if "foreign" in os.environ["PYTEST_CURRENT_TEST"] and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    (here.path / "other.so").write_bytes(here.real.read_bytes()[::-1])
    (here.path / "secret.so").touch()
    damage(getattr(entry, part))
    assert find() is None
    assert store.counters.bad == len(store.counters.reasons) == 1
    assert find() is None
    healed = obtain()
    assert (healed.value, healed.origin) == (42, "compiled")
    assert obtain().origin == "disk"
    assert store.counters.bad == 1
    assert store.counters.errors == 0
    assert not (here.path / "marker").exists()
    assert (here.path / "secret.so").exists()


def damaged_copies(path: Path, damages: Sequence[Callable[[], object]]) -> int:
    """Apply each damage to a fresh entry; how many of them were found out."""
    good = {file: file.read_bytes() for file in path.parent.iterdir()}
    assert find() is not None
    found_out = 0
    for damage in damages:
        damage()
        found_out += find() is None
        for file, data in good.items():
            file.write_bytes(data)
    assert find() is not None
    return found_out


@pytest.mark.parametrize("part", ["manifest", "library"])
def test_every_truncation_and_flipped_bit_is_found(entry: Entry, part: str) -> None:
    path = getattr(entry, part)
    size = path.stat().st_size
    sizes = [size * i // 25 for i in range(25)]
    assert damaged_copies(path, [partial(os.truncate, path, s) for s in sizes]) == 25
    flips = [(size * i // 50, i % 8) for i in range(50)]
    assert damaged_copies(path, [partial(fault_tools.flip_bit, path, *flip) for flip in flips]) == 50
    assert store.counters.bad == 75
    assert len(store.counters.reasons) == 20


def test_no_manifest_is_a_plain_miss(here: Here, entry: Entry) -> None:
    entry.manifest.unlink()
    assert find() is None
    assert obtain().origin == "compiled"
    assert store.counters == store.Counters()


def test_deleted_between_manifest_and_load(here: Here, entry: Entry) -> None:
    def load_late(path: Path) -> bytes:
        if here.builds() == 1:
            path.unlink()
        return path.read_bytes()[:4]

    assert obtain(load=load_late).value == b"\x7fELF"
    assert here.builds() == 2
    assert store.counters.bad == 1


def test_library_that_does_not_load_is_rebuilt_once(here: Here, entry: Entry) -> None:
    tried = []

    def refuse(path: Path) -> NoReturn:
        tried.append(path)
        raise ImportError("made for another interface")

    with pytest.raises(ImportError, match="another interface"):
        obtain(load=refuse)
    assert here.builds() == 2
    assert len(tried) == 3  # from disk, as published, and from the private directory
    assert find() is None
    assert obtain().value == 42


def test_nothing_may_be_executed_from_the_cache(here: Here) -> None:
    def load_elsewhere(path: Path) -> int:
        if path.is_relative_to(here.cache):
            raise OSError("failed to map segment from shared object")
        return load(path)

    assert obtain(load=load_elsewhere).value == 42


def test_planted_library_never_runs(here: Here, entry: Entry, monkeypatch: Patch) -> None:
    planted, marker = here.path / "planted.so", here.path / "marker"
    monkeypatch.setenv("MARKER", str(marker))
    monkeypatch.delenv("CXX")
    source = """#include <cstdlib>
        #include <sys/stat.h>
        __attribute__((constructor)) static void run() { mkdir(std::getenv("MARKER"), 0700); }"""
    compiler.compile_library(found_compiler(), source + SOURCE, (), planted)
    shutil.copyfile(planted, entry.library)
    assert obtain().value == 42
    assert not marker.exists()
    load(planted)
    assert marker.exists()


@pytest.mark.parametrize(("fault", "message"), DIRECTORY_DAMAGE.values(), ids=DIRECTORY_DAMAGE)
def test_directory_that_others_could_change(
    here: Here, entry: Entry, fault: Damage, message: str, monkeypatch: Patch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if "belongs" in message and os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    fault(here.cache)
    with pytest.warns(store.CacheWarning, match=message) as caught:
        assert obtain().value == 42
    assert len(caught) == 1
    assert obtain().origin == "compiled"  # silently: warnings are errors here
    assert here.builds() == 3


def test_sticky_parent_of_mine_is_trusted(here: Here, entry: Entry) -> None:
    here.path.chmod(0o1777)  # as /tmp is root's
    assert obtain().origin == "disk"


def test_what_was_checked_is_loaded(here: Here, entry: Entry) -> None:
    """Whatever somebody puts in its place between the check and the load."""

    def exchanged(path: Path) -> int:
        os.rename(here.cache, here.path / "away")
        here.cache.mkdir()
        shutil.copy(here.path / "other.so", here.cache / entry.library.name)
        return load(path)

    compiler.compile_library(found_compiler(named=False), SOURCE.replace("42", "666"), (), here.path / "other.so")
    assert obtain(load=exchanged).value == 42
    assert load(here.path / "other.so") == 666


def test_libraries_loaded_one_after_another_are_not_mixed_up(here: Here) -> None:
    """The loader remembers names, and a descriptor has the number of one that was closed before."""
    for i, key in enumerate(KEYS[:4]):
        library = here.path / f"{i}.so"
        compiler.compile_library(found_compiler(named=False), SOURCE.replace("42", str(i)), (), library)
        here.use(fault_tools.copying_compiler(here.path / "cxx", library, here.log))
        assert obtain(key).value == i
    here.use(here.path / "absent")
    assert [obtain(key).value for key in KEYS[3::-1]] == [3, 2, 1, 0]


def obtain_in_order(keys: Sequence[str]) -> None:
    for key in keys:
        obtain(key)


def keys_in(directory: Path) -> set[str]:
    return {path.name[:32] for path in directory.iterdir()}


@pytest.mark.parametrize("limit", ["bytes", "entries"])
def test_least_recently_used_entries_are_dropped(here: Here, monkeypatch: Patch, limit: str) -> None:
    if limit == "bytes":
        monkeypatch.setenv("COMPILED_OPTIM_CACHE_LIMIT", str(3 * here.real.stat().st_size + 3000))
    else:
        monkeypatch.setattr(tidy, "ENTRIES", 3)
    obtain_in_order([*KEYS[:3], KEYS[0], KEYS[3]])
    assert keys_in(here.cache) == {KEYS[0], KEYS[2], KEYS[3]}
    obtain_in_order([KEYS[2], KEYS[4], KEYS[5]])
    assert keys_in(here.cache) == {KEYS[2], KEYS[4], KEYS[5]}
    assert store.counters == store.Counters()
    builds = here.builds()
    obtain_in_order([KEYS[2], KEYS[5]])
    assert here.builds() == builds
    assert len(list(here.cache.iterdir())) == 6


def test_library_larger_than_the_limit_is_not_kept(here: Here, entry: Entry, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COMPILED_OPTIM_CACHE_LIMIT", "1K")
    assert obtain(OTHER_KEY).value == 42
    assert keys_in(here.cache) == {KEY}
    assert "1024" in store.counters.reasons[0]


def test_entry_dropped_between_manifest_and_library_is_a_plain_miss(here: Here, entry: Entry) -> None:
    opened().drop(KEY)
    assert list(here.cache.iterdir()) == []
    entry.library.touch()
    assert find() is None
    assert store.counters == store.Counters()


def test_writers_sweep_what_others_left(here: Here, entry: Entry) -> None:
    """Locks, temporary files and bad entries of every key, but not of one that is being written."""
    shutil.copy(entry.library, here.cache / f"{KEY}-{'0' * 16}.so")  # of a manifest that was replaced
    left = [f"{KEYS[1]}.lock", f"{KEYS[2]}.json.{'0' * 16}.tmp", f"{KEYS[3]}.json.bad", f"{KEYS[4]}-{'0' * 16}.so"]
    for name in [*left, f"{KEYS[5]}.json.{'0' * 16}.tmp", "notes.txt"]:
        (here.cache / name).touch()
    (here.cache / f"{KEYS[6]}.json.bad").mkdir()
    os.truncate(here.cache / f"{KEYS[3]}.json.bad", 2**40)  # takes no room
    with opened().writer(KEYS[5]) as held:
        assert held
        assert obtain(OTHER_KEY).value == 42
        assert keys_in(here.cache) == {KEY, OTHER_KEY, KEYS[5], "notes.txt"}
    assert find() is not None
    (here.cache / f"{KEYS[5]}.json.{'0' * 16}.tmp").unlink()


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_modes_do_not_depend_on_umask(here: Here, monkeypatch: Patch, umask: int) -> None:
    monkeypatch.setenv("COMPILED_OPTIM_CACHE_DIR", str(here.cache / "new" / "deep"))
    previous = os.umask(umask)
    try:
        store.open_store()
        with opened().writer(KEY) as held, compiler.private_directory() as private:
            assert held
            assert private.stat().st_mode & 0o777 == 0o700
            opened().publish(KEY, here.real, {}, "")
    finally:
        os.umask(previous)
    deep = here.cache / "new" / "deep"
    assert {path.stat().st_mode & 0o777 for path in (here.cache, deep.parent, deep)} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in deep.iterdir()} == {0o600}
    assert len(list(deep.iterdir())) == 2
