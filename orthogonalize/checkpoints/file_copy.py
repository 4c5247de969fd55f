"""Copy unchanged files as cheaply as the file system allows."""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from fcntl import ioctl
from pathlib import Path

from ..core.errors import OrthogonalizeError
from ..core.progress import Progress

CLONE = 0x40049409  # the ioctl FICLONE: two files share their blocks until one changes
BUFFER = 32 * 2**20  # bytes read at a time


def copy_file(source: Path, target: Path, link: bool = False) -> None:
    """Copy a file as cheaply as the file system allows: by shared blocks (reflink), else by a copy in the kernel.

    With `link` it becomes a hard link where possible.

    Raises:
        OrthogonalizeError: the source shrank meanwhile.
    """
    source = source.resolve()  # files in the Hub's cache are symbolic links
    if link:
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    with source.open("rb") as old, target.open("xb") as new:
        try:
            ioctl(new.fileno(), CLONE, old.fileno())
            return
        except OSError:
            pass
        size = left = os.fstat(old.fileno()).st_size
        try:
            while left:
                count = os.copy_file_range(old.fileno(), new.fileno(), left)
                if not count:
                    raise OrthogonalizeError(f"{source} was truncated while it was being copied; fetch it again")
                left -= count
        except OSError:
            if left != size:
                raise
            shutil.copyfileobj(old, new, BUFFER)
        os.fsync(new.fileno())


def copy_and_hash(source: Path, target: Path, link: bool, advance: Progress) -> str:
    """Copy a file (see `copy_file`) and return its SHA-256, computed meanwhile."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as copier:
        copying = copier.submit(copy_file, source, target, link)
        with source.open("rb", buffering=0) as file:
            buffer = bytearray(BUFFER)
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                advance(count)
        copying.result()
    return digest.hexdigest()
