"""Measure how much of a disk a folder takes while something runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

INTERVAL = 0.002  # seconds between two looks


def disk_use(folder: Path) -> int:
    """The bytes that the files in `folder` take on the disk; links to one file count once."""
    blocks: dict[int, int] = {}
    for parent, _, names in os.walk(folder):  # which passes over folders that are removed meanwhile
        for name in names:
            with suppress(OSError):
                stat = os.lstat(os.path.join(parent, name))
                blocks[stat.st_ino] = 512 * stat.st_blocks
    return sum(blocks.values())


class Peak:
    """The most that a folder has taken beyond what it took at first, in bytes; `look` may be called at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before, self.bytes = folder, disk_use(folder), 0

    def look(self) -> None:
        self.bytes = max(self.bytes, disk_use(self.folder) - self.before)


@contextmanager
def peak_disk_use(folder: Path) -> Iterator[Peak]:
    """The peak of a folder's use of the disk in this context, looked at all the time by a thread of its own."""
    peak, done = Peak(folder), threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            peak.look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.look()
