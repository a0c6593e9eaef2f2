"""Checks that nobody but this user and root can change or replace a file of code."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_serial = itertools.count()


class Distrust(Exception):
    """This file must not be used; the message says why."""


def directory_problem(directory: Path) -> str | None:
    """Why code in a directory cannot be trusted, or None.

    It must be a real directory that only this user can write, and only this user and root may be able to replace it by
    writing one of its parents.

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
        status = os.lstat(parent)
        if status.st_uid not in (0, os.geteuid()):
            return f"{directory} can be replaced by others, because {parent} belongs to user {status.st_uid}"
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            mode = f"mode {stat.S_IMODE(status.st_mode):o}; chmod go-w mends it"
            return f"{directory} can be replaced by others, who can write {parent} ({mode})"
    return None


@contextmanager
def open_mine(path: Path, limit: int) -> Iterator[int]:
    """A descriptor of a file that only this user can write. Follows no link and does not block on a FIFO.

    Raises:
        Distrust: it is something else, or has more than ``limit`` bytes.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise Distrust(f"{path.name} is a link or a socket") from None
        raise
    try:
        status = os.fstat(descriptor)
        if status.st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "deleted while it was opened", str(path))
        if not stat.S_ISREG(status.st_mode):
            raise Distrust(f"{path.name} is not a regular file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o022 or status.st_nlink != 1:
            raise Distrust(f"{path.name} has another owner, another writer or another name")
        if status.st_size > limit:
            raise Distrust(f"{path.name} has {status.st_size} bytes, {limit} at most were expected")
        yield descriptor
    finally:
        os.close(descriptor)


def contents(descriptor: int, limit: int) -> bytes:
    """All of a file, up to ``limit`` bytes."""
    with open(descriptor, "rb", closefd=False) as file:
        return file.read(limit)


def loadable(descriptor: int, path: Path) -> Path:
    """A path by which the dynamic loader opens the file of ``descriptor``, even if ``path`` was replaced meanwhile.

    Raises:
        OSError: there is no /proc, and ``path`` was replaced.
    """
    # The loader does not open a name twice, and descriptor numbers are reused: so each name takes another detour.
    detour = "".join(("../fd/", "../../self/fd/")[bit == "1"] for bit in f"{next(_serial):b}")
    by_descriptor = Path(f"/proc/self/fd/{detour}{descriptor}")
    found = by_descriptor if by_descriptor.exists() else path
    if not os.path.samestat(os.stat(found), os.fstat(descriptor)):
        raise OSError(errno.ESTALE, "replaced after it was checked", str(path))
    return found
