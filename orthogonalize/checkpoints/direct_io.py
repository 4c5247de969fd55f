"""A file written in order and past the page cache, which a checkpoint would only fill."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path

REQUEST = 8 * 2**20  # bytes that are written at once
BLOCK = 4096  # bytes: what is written past the page cache begins and ends at multiples of it


class DirectStream:
    """Writes a file in order, in whole blocks, past the page cache, where the file system can."""

    def __init__(self, path: Path) -> None:
        self.carry = bytearray()  # what does not fill a block yet
        self.done = 0
        self.block = mmap(-1, BLOCK)  # memory that begins at a block
        self.descriptor = -1
        self.requests = ThreadPoolExecutor(4)
        try:
            self.descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
            os.pwrite(self.descriptor, self.block, 0)  # some file systems open it and refuse to write
        except (OSError, AttributeError):
            self.close()

    @property
    def usable(self) -> bool:
        return self.descriptor >= 0

    def copy(self, data: bytes) -> None:
        """Append bytes that lie anywhere in memory."""
        for start in range(0, len(data), BLOCK // 2):
            self.write(memoryview(data)[start : start + BLOCK // 2])

    def write(self, view: memoryview) -> None:
        """Append bytes; those that fill blocks are written from where they are, which must be aligned as the file."""
        if self.carry:
            head = view[: BLOCK - len(self.carry)]
            self.carry += head
            view = view[len(head) :]
            if len(self.carry) == BLOCK:
                self.block[:] = bytes(self.carry)
                self._put(memoryview(self.block))
                self.carry.clear()
        whole = len(view) - len(view) % BLOCK
        self._put(view[:whole])
        self.carry += view[whole:]

    def _put(self, view: memoryview) -> None:
        """Write whole blocks, several requests at once, as disks want them."""
        starts = range(0, len(view), REQUEST)
        requests = [self.requests.submit(self._put_one, view[s : s + REQUEST], self.done + s) for s in starts]
        for request in requests:
            request.result()
        self.done += len(view)

    def _put_one(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self.descriptor, view, offset)
            view, offset = view[count:], offset + count

    def rest(self) -> tuple[int, memoryview]:
        """Where the last, unfilled block begins, and what is in it."""
        return self.done, memoryview(bytes(self.carry))

    def close(self) -> None:
        """Close the file, complete or not."""
        self.requests.shutdown()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
