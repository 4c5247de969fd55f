"""Temporary folders that a killed process does not leave behind for ever: the next command removes them."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .files import no_follow
from .locks import try_lock

PREFIX = "orthogonalize-"
LOCK = ".lock"
AGE = 3600  # seconds after which a folder without a lock is one that a killed process left

_own: set[Path] = set()  # this process's own, since a record lock does not keep a process from its own files


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder, which only this user can enter, in the system's temporary folder (`TMPDIR`).

    It is removed at the end, and so are those of killed processes, whose locks the kernel has freed.

    Raises:
        OSError: it cannot be created.
    """
    parent = Path(tempfile.gettempdir()).resolve()
    for stale in parent.glob(f"{PREFIX}*"):
        _remove_unless_used(stale)
    outer = parent / f"{PREFIX}{secrets.token_hex(8)}"
    _own.add(outer)
    try:
        outer.mkdir(mode=0o700)
        with open(outer / LOCK, "xb", opener=no_follow) as lock:
            with suppress(OSError):  # a file system without locks
                try_lock(lock.fileno())
            inner = outer / "files"
            inner.mkdir()
            yield inner
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        _own.discard(outer)


def _remove_unless_used(folder: Path) -> None:
    """Remove a folder of this user's whose process is gone; a new one without a lock is about to get it."""
    with suppress(OSError):
        if folder in _own or folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return
        if not (folder / LOCK).exists():
            if time.time() - folder.stat().st_mtime > AGE:
                shutil.rmtree(folder, ignore_errors=True)
            return
        with open(folder / LOCK, "r+b", opener=no_follow) as lock:
            if try_lock(lock.fileno()):
                shutil.rmtree(folder, ignore_errors=True)
