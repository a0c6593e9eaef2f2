"""Native code on disk. A library is loaded only if this user alone can write it and its hash is right.

For each key a flat directory holds the library, `<key>-<start of sha256>` and a suffix; `<key>.json`, its manifest,
published last; and `<key>.lock`, while a writer holds it. Readers take no lock and need no right to write, so a
read-only directory works. Where they can they set a library's time of access, which tells the least recently used
entries.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar, Union

from compiled_optim._engine import settings
from compiled_optim._engine.cache.trust import Distrust, contents, directory_problem, loadable, open_mine

T = TypeVar("T")

SCHEMA = 2
Fact: TypeAlias = Union[str, int, float, "list[Fact]"]

_MANIFEST_LIMIT = 2**20
_LIBRARY_LIMIT = 2**28
_POLL_SECONDS = 0.02
_KEPT_REASONS = 20

_KEY = r"[0-9a-f]{32}"
_SUFFIX = r"\.[a-z]+"
_TEMPORARY = r"\.[0-9a-f]{16}\.tmp"
OURS = re.compile(rf"({_KEY})(-[0-9a-f]{{16}}{_SUFFIX}|\.json|\.lock)(\.bad|{_TEMPORARY})?")  # the names of our files


class CacheWarning(UserWarning):
    """Native code is kept in memory only, and every process compiles its own."""


@dataclass
class Counters:
    """The errors of the disk cache in this process."""

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
class _Manifest:
    schema: int
    key: str
    compiler: str
    sha256: str
    size: int
    suffix: str
    facts: dict[str, Fact]

    @property
    def library(self) -> str:
        return f"{self.key}-{self.sha256[:16]}{self.suffix}"  # its parts are checked, or it could be any path

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def encode(self) -> bytes:
        return json.dumps({**asdict(self), "digest": self._digest()}, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes, key: str) -> _Manifest:
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            raise Distrust("manifest is not JSON") from None
        types = {"schema": int, "key": str, "compiler": str, "sha256": str, "size": int, "suffix": str}
        types |= {"facts": dict, "digest": str}
        if not isinstance(fields, dict) or {name: type(value) for name, value in fields.items()} != types:
            raise Distrust("manifest has other fields than expected")
        digest = fields.pop("digest")
        manifest = cls(**fields)
        if manifest._digest() != digest:
            raise Distrust("manifest is damaged")
        if manifest.schema != SCHEMA or manifest.key != key or not re.fullmatch("[0-9a-f]{64}", manifest.sha256):
            raise Distrust("manifest describes something else")
        if not re.fullmatch(_SUFFIX, manifest.suffix):
            raise Distrust(f"manifest gives an impossible suffix {manifest.suffix!r}")
        if not 0 < manifest.size <= _LIBRARY_LIMIT:
            raise Distrust(f"manifest gives an impossible size of {manifest.size} bytes")
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
            return Store(root.parent.resolve() / root.name, settings.cache_limit())
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
        os.chmod(directory, 0o700)  # whatever the umask


class Store:
    """The files of one directory that `directory_problem` found nothing wrong with. Keys come from `machine_key`.

    Args:
        root: the directory.
        limit: how many bytes a library may have.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit

    def load(self, key: str, fingerprint: str | None, load: Callable[[Path], T]) -> tuple[T, dict[str, Fact]] | None:
        """Check an entry from end to end and load its library.

        Args:
            key: the entry's key.
            fingerprint: of the compiler at hand; an entry made by another one is a miss. None, for no compiler at
                hand, accepts any.
            load: opens a library, and raises OSError, ImportError or RuntimeError if it does not fit.

        Returns:
            What `load` returned and the entry's facts; None for a miss, which includes every error. A bad entry is
            set aside and counted first.
        """
        manifest = None
        try:
            while True:
                before, manifest = manifest, self._manifest(key)
                if fingerprint not in (None, manifest.compiler):
                    return None
                try:
                    return self._load(manifest, load), manifest.facts
                except FileNotFoundError:
                    if manifest == before:  # otherwise a writer may just have replaced both
                        raise
        except FileNotFoundError:
            if manifest is not None:
                self._set_aside(key, manifest, f"{manifest.library} is missing")
        except Distrust as problem:
            self._set_aside(key, manifest, str(problem))
        except OSError as error:
            counters.count_error(f"{key} cannot be read: {error}")
        return None

    def _load(self, manifest: _Manifest, load: Callable[[Path], T]) -> T:
        library = self.root / manifest.library
        with open_mine(library, manifest.size) as descriptor:
            if hashlib.sha256(contents(descriptor, manifest.size)).hexdigest() != manifest.sha256:
                raise Distrust(f"{library.name} is damaged")
            with suppress(OSError):
                os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
            path = loadable(descriptor, library)
            try:
                return load(path)
            except (OSError, ImportError, RuntimeError) as error:  # such as a file system that allows no execution
                raise Distrust(f"{library.name} does not load: {error}") from error

    def _manifest(self, key: str) -> _Manifest:
        with open_mine(self.root / f"{key}.json", _MANIFEST_LIMIT) as descriptor:
            return _Manifest.decode(contents(descriptor, _MANIFEST_LIMIT), key)

    def _set_aside(self, key: str, manifest: _Manifest | None, reason: str) -> None:
        """Put a bad entry out of the way and count it, unless another process just did so."""
        if _put_away(self.root / f"{key}.json"):
            counters.count_bad(reason)
            if manifest is not None:
                _put_away(self.root / manifest.library)

    def publish(self, key: str, library: Path, facts: Mapping[str, Fact], fingerprint: str) -> bool:
        """Copy a library into the store; call it while holding `writer`.

        Args:
            key: the entry's key.
            library: the library to copy.
            facts: anything worth knowing about it without loading it; JSON keeps it.
            fingerprint: of the compiler that made it.

        Returns:
            Whether it is there. If not, the error is counted and nothing of it is left.
        """
        try:
            code = library.read_bytes()
            digest = hashlib.sha256(code).hexdigest()
            manifest = _Manifest(SCHEMA, key, fingerprint, digest, len(code), library.suffix, dict(facts))
            self._write(manifest.library, code, min(_LIBRARY_LIMIT, self.limit))
            self._write(f"{key}.json", manifest.encode(), _MANIFEST_LIMIT)
            self._sweep(key)
        except OSError as error:
            counters.count_error(f"{key} cannot be published: {error}")
            return False
        return True

    def _write(self, name: str, data: bytes, limit: int) -> None:
        if not 0 < len(data) <= limit:
            raise OSError(errno.EFBIG, f"expected 1 to {limit} bytes, got {len(data)}", name)
        temporary = self.root / f"{name}.{secrets.token_hex(8)}.tmp"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.fchmod(descriptor, 0o600)  # whatever the umask
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
    def writer(self, key: str, seconds: float = 0, cancelled: threading.Event | None = None) -> Iterator[bool]:
        """Hold the right to write an entry, against other threads and processes.

        Args:
            key: the entry's key.
            seconds: how long to wait for another writer, unless `cancelled` is set before.

        Returns:
            Whether it is held. If not, after the time limit or where locks do not work, do not publish.
        """
        path = self.root / f"{key}.lock"
        descriptor = _lock(path, seconds, cancelled or threading.Event())
        if descriptor is None:
            yield False
            return
        try:
            yield True
        finally:
            with suppress(OSError):
                os.unlink(path)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile shares the lock
            os.close(descriptor)

    def sweep(self, key: str) -> None:
        """Remove what killed writers and bad entries left of a key, unless it is being written."""
        with self.writer(key) as held:
            if held:
                self._sweep(key)

    def _sweep(self, key: str) -> None:
        kept = {f"{key}.json", f"{key}.lock"}
        with suppress(FileNotFoundError, Distrust):
            kept.add(self._manifest(key).library)
        self._remove(re.compile(re.escape(key) + ".*"), kept)

    def drop(self, key: str) -> None:
        """Remove an entry, unless it is being written."""
        with self.writer(key) as held:
            if held:
                _delete(self.root / f"{key}.json")  # first: a library alone is a miss, a manifest alone a bad entry
                self._remove(re.compile(re.escape(key) + ".*"), {f"{key}.lock"})

    def clear(self) -> None:
        """Remove every file with a name of ours and no other. Other processes may use the store meanwhile."""
        self._remove(OURS)

    def _remove(self, pattern: re.Pattern[str], kept: Container[str] = ()) -> None:
        with suppress(FileNotFoundError):
            for name in os.listdir(self.root):
                if OURS.fullmatch(name) and pattern.fullmatch(name) and name not in kept:
                    _delete(self.root / name)


def _delete(path: Path) -> None:
    with suppress(OSError):
        try:
            os.unlink(path)
        except (IsADirectoryError, PermissionError):
            os.rmdir(path)


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


def _lock(path: Path, seconds: float, cancelled: threading.Event) -> int | None:
    """A descriptor that holds the lock at ``path``, which its holder removes; None if it cannot be had."""
    deadline = time.monotonic() + seconds
    while True:
        held = False
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        except OSError:
            return None
        try:
            os.fchmod(descriptor, 0o600)  # whatever the umask
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(descriptor).st_nlink > 0
            if held:
                return descriptor
            continue  # its last holder has removed it
        except BlockingIOError:
            pass
        except OSError:
            return None
        finally:
            if not held:
                os.close(descriptor)
        if time.monotonic() >= deadline or cancelled.wait(_POLL_SECONDS):
            return None
