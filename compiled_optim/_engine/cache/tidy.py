"""Keeps the cache within its limits. A writer calls this after it has published."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field

from compiled_optim._engine import settings
from compiled_optim._engine.cache.store import OURS, Store

ENTRIES = 4096  # at most, because every writer looks at each of them


@dataclass
class _Files:
    """All files of one key: their names without the key, the bytes of the entry, and when it was last used."""

    ends: list[str] = field(default_factory=list)
    size: int = 0
    used: int = 0

    @property
    def in_order(self) -> bool:
        """Whether they are a manifest and its library."""
        others = [end for end in self.ends if end != ".json"]
        return len(self.ends) == 2 and len(others) == 1 and others[0].startswith("-") and others[0].count(".") == 1


def tidy(store: Store, own: str) -> None:
    """Removes leftovers of killed writers and bad entries, then the least recently used entries above the limits.

    A directory that cannot be read is left as it is.

    Args:
        own: the key of the entry that has just been published, which stays.
    """
    found: dict[str, _Files] = {}
    with suppress(OSError), os.scandir(store.root) as entries:
        for entry in entries:
            ours = OURS.fullmatch(entry.name)
            with suppress(FileNotFoundError):  # by another one that tidies
                if ours:
                    status = entry.stat(follow_symlinks=False)
                    files = found.setdefault(ours[1], _Files())
                    files.ends.append(entry.name.removeprefix(ours[1]))
                    files.size += 0 if ours[3] else status.st_size
                    files.used = max(files.used, status.st_atime_ns)
    kept = found.pop(own, _Files()).size
    for key, files in list(found.items()):
        if files.size > store.limit:  # the limit was lowered, or it is damaged
            store.drop(key)
            del found[key]
        elif not files.in_order:
            store.sweep(key)
    count, size = len(found) + 1, sum(files.size for files in found.values()) + kept
    for key, files in sorted(found.items(), key=lambda item: item[1].used):
        if count <= ENTRIES and size <= store.limit:
            break
        settings.logger.info("disk cache: %s is dropped for others that were used since", key)
        store.drop(key)
        count, size = count - 1, size - files.size
