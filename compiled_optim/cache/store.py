"""Native code on disk, in a form that can be trusted: nothing is loaded that is not mine, whole and in its place.

A flat directory holds, for each key, `<key>-<start of sha256>.so`, the library; `<key>.json`, its manifest, published
last; and `<key>.lock`, which writers take. Readers take no lock and write nothing, so read-only media serve their hits.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias, Union

from .. import settings

SCHEMA = 1
Fact: TypeAlias = Union[str, int, float, "list[Fact]"]

_MANIFEST_LIMIT = 2**20
_LIBRARY_LIMIT = 2**28
_POLL_SECONDS = 0.02
_KEPT_REASONS = 20

_KEY = r"[0-9a-f]{32}"
_TEMPORARY = r"\.[0-9a-f]{16}\.tmp"
_OURS = re.compile(rf"{_KEY}(-[0-9a-f]{{16}}\.so|\.json|\.lock)(\.bad|{_TEMPORARY})?")


class CacheWarning(UserWarning):
    """Native code is kept in memory only, and every process compiles its own."""


@dataclass
class Counters:
    """What went wrong with the disk cache in this process."""

    bad: int = 0  # entries that failed a check and were set aside
    errors: int = 0  # reads and writes that failed for another reason
    reasons: list[str] = field(default_factory=list)  # the last few of both

    def count_bad(self, reason: str) -> None:
        self.bad += 1
        self._keep(reason)

    def count_error(self, reason: str) -> None:
        self.errors += 1
        self._keep(reason)

    def _keep(self, reason: str) -> None:
        settings.logger.info("disk cache: %s", reason)
        self.reasons.append(reason)
        del self.reasons[:-_KEPT_REASONS]


counters = Counters()
_warned: set[str | None] = set()


@dataclass(frozen=True)
class Entry:
    """A library found whole, and what its maker recorded about it."""

    key: str
    library: Path
    facts: dict[str, Fact]


class _Bad(Exception):
    """This file must not be used; the message says why."""


@dataclass(frozen=True)
class _Manifest:
    schema: int
    key: str
    compiler: str
    sha256: str
    size: int
    facts: dict[str, Fact]

    @property
    def library(self) -> str:
        return f"{self.key}-{self.sha256[:16]}.so"  # never read from the file: it could name anything

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def encode(self) -> bytes:
        return json.dumps({**asdict(self), "digest": self._digest()}, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes, key: str) -> _Manifest:
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            raise _Bad("manifest is not JSON") from None
        types = {"schema": int, "key": str, "compiler": str, "sha256": str, "size": int, "facts": dict, "digest": str}
        if not isinstance(fields, dict) or {name: type(value) for name, value in fields.items()} != types:
            raise _Bad("manifest has other fields than expected")
        digest = fields.pop("digest")
        manifest = cls(**fields)
        if manifest._digest() != digest:
            raise _Bad("manifest is damaged")
        if manifest.schema != SCHEMA or manifest.key != key or not re.fullmatch("[0-9a-f]{64}", manifest.sha256):
            raise _Bad("manifest describes something else")
        if not 0 < manifest.size <= _LIBRARY_LIMIT:
            raise _Bad(f"manifest gives an impossible size of {manifest.size} bytes")
        return manifest


def open_store() -> Store | None:
    """The disk cache of this user, its directory made if need be.

    Returns:
        None if the disk cache is switched off or, after a `CacheWarning` (once per reason), if it cannot be trusted.
    """
    if not settings.disk_cache():
        return None
    root = settings.cache_directory()
    problem: str | None = "this user has no home directory"
    if root is not None:
        try:
            _make_private(root)
            problem = directory_problem(root)
        except OSError as error:
            problem = f"{root} cannot be used ({error})"
        if problem is None:
            return Store(root)
    if problem not in _warned:
        _warned.add(problem)
        message = (
            f"compiled kernels are kept in memory only: {problem}. Set COMPILED_OPTIM_CACHE_DIR to a directory that "
            "only you can write, or COMPILED_OPTIM_DISK_CACHE=0 to do without."
        )
        settings.warn(message, CacheWarning)
    return None


def _make_private(directory: Path) -> None:
    if os.path.lexists(directory):
        return
    _make_private(directory.parent)
    with suppress(FileExistsError):  # another process was faster
        os.mkdir(directory, 0o700)
        os.chmod(directory, 0o700)  # an odd umask takes bits from the owner, too


def directory_problem(directory: Path) -> str | None:
    """Why code in a directory cannot be trusted; None if it is a real one that this user alone can write.

    Raises:
        OSError: the directory cannot be examined.
    """
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode):
        return f"{directory} is a link or a file; expected a directory"
    if status.st_uid != os.geteuid():
        return f"{directory} belongs to user {status.st_uid}; expected {os.geteuid()}"
    if status.st_mode & 0o022:
        return f"{directory} can be written by others (mode {stat.S_IMODE(status.st_mode):o}; chmod go-w mends it)"
    for parent in directory.resolve().parents:
        mode = os.lstat(parent).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"{directory} can be replaced by others, because anybody can write {parent}"
    return None


def _read(path: Path, limit: int) -> bytes:
    """Read a file of mine and of no more than `limit` bytes, following no link and waiting for no FIFO."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _Bad(f"{path.name} is a link or a socket") from None
        raise
    try:
        status = os.fstat(descriptor)
        if status.st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "deleted while it was opened", str(path))
        if not stat.S_ISREG(status.st_mode):
            raise _Bad(f"{path.name} is not a regular file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o022 or status.st_nlink != 1:
            raise _Bad(f"{path.name} has another owner, another writer or another name")
        if status.st_size > limit:
            raise _Bad(f"{path.name} has {status.st_size} bytes, {limit} at most were expected")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(descriptor)


class Store:
    """The files of one directory that `directory_problem` found nothing wrong with. Keys come from `machine_key`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, key: str, fingerprint: str | None) -> Entry | None:
        """Look up an entry and check it from end to end.

        Args:
            key: the entry's key.
            fingerprint: of the compiler at hand; an entry made by another one is a miss. None, for no compiler at
                hand, accepts any.

        Returns:
            None for a miss, which includes every error. A bad entry is set aside and counted first.
        """
        library = None
        try:
            manifest = _Manifest.decode(_read(self.root / f"{key}.json", _MANIFEST_LIMIT), key)
            if fingerprint is not None and manifest.compiler != fingerprint:
                return None
            library = self.root / manifest.library
            if hashlib.sha256(_read(library, manifest.size)).hexdigest() != manifest.sha256:
                raise _Bad(f"{library.name} is damaged")
            return Entry(key, library, manifest.facts)
        except FileNotFoundError:
            if library is not None:
                self.set_aside(key, library, f"{library.name} is missing")
        except _Bad as bad:
            self.set_aside(key, library, str(bad))
        except OSError as error:
            counters.count_error(f"{key} cannot be read: {error}")
        return None

    def set_aside(self, key: str, library: Path | None, reason: str) -> None:
        """Put a bad entry out of the way and count it, unless another process just did so."""
        if _put_away(self.root / f"{key}.json"):
            counters.count_bad(reason)
            if library is not None:
                _put_away(library)

    def publish(self, key: str, library: Path, facts: Mapping[str, Fact], fingerprint: str) -> Entry:
        """Copy a library into the store; call it while holding `writer`.

        Args:
            key: the entry's key.
            library: the library to copy.
            facts: anything worth knowing about it without loading it; JSON keeps it.
            fingerprint: of the compiler that made it.

        Raises:
            OSError: it could not be written, and nothing of it is left.
        """
        code = library.read_bytes()
        manifest = _Manifest(SCHEMA, key, fingerprint, hashlib.sha256(code).hexdigest(), len(code), dict(facts))
        self._remove(re.compile(rf"{key}.*{_TEMPORARY}"))  # of a writer that was killed
        self._write(manifest.library, code, _LIBRARY_LIMIT)
        self._write(f"{key}.json", manifest.encode(), _MANIFEST_LIMIT)
        return Entry(key, self.root / manifest.library, manifest.facts)

    def _write(self, name: str, data: bytes, limit: int) -> None:
        if not 0 < len(data) <= limit:
            raise OSError(errno.EFBIG, f"expected 1 to {limit} bytes, got {len(data)}", name)
        temporary = self.root / f"{name}.{secrets.token_hex(8)}.tmp"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.fchmod(descriptor, 0o600)  # an odd umask takes bits from the owner, too
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, self.root / name)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    @contextmanager
    def writer(self, key: str, seconds: float) -> Iterator[bool]:
        """Hold the right to write an entry, against other threads and processes.

        Args:
            key: the entry's key.
            seconds: how long to wait for another writer.

        Returns:
            Whether it is held. If not, after the time limit or where locks do not work, do not publish.
        """
        owner, held = os.getpid(), False
        try:
            descriptor = os.open(
                self.root / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600
            )
        except OSError:
            yield False
            return
        try:
            held = _lock(descriptor, seconds)
            yield held
        finally:
            if held and os.getpid() == owner:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child forked meanwhile shares the lock, and may live long
            os.close(descriptor)

    def clear(self) -> None:
        """Remove every file that has a name of ours and nothing else; others may use or clear the store meanwhile."""
        self._remove(_OURS)

    def _remove(self, pattern: re.Pattern[str]) -> None:
        with suppress(FileNotFoundError):
            for name in os.listdir(self.root):
                if pattern.fullmatch(name):
                    with suppress(OSError):
                        os.unlink(self.root / name)


def _put_away(path: Path) -> bool:
    """Rename a bad file, delete it if that fails, leave it on read-only media; False if it is gone already."""
    try:
        os.rename(path, f"{path}.bad")
    except FileNotFoundError:
        return False
    except OSError:
        with suppress(OSError):
            os.unlink(path)
    return True


def _lock(descriptor: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            os.fchmod(descriptor, 0o600)  # as in `_write`
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError:
            return False
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
