"""Write a file sequentially with O_DIRECT, so that a checkpoint does not fill the page cache."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path

REQUEST = 8 * 2**20  # bytes per write request
BLOCK = 4096  # bytes: O_DIRECT writes begin and end at multiples of it


class DirectStream:
    """Writes a file sequentially, in whole blocks, bypassing the page cache if the file system supports that."""

    def __init__(self, path: Path) -> None:
        self.carry = bytearray()  # bytes that do not fill a block yet
        self.done = 0
        self.block = mmap(-1, BLOCK)  # page-aligned memory
        self.descriptor = -1
        self.requests = ThreadPoolExecutor(4)
        try:
            self.descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
            os.pwrite(self.descriptor, self.block, 0)  # some file systems accept O_DIRECT on open and refuse to write
        except (OSError, AttributeError):
            self.close()

    @property
    def usable(self) -> bool:
        return self.descriptor >= 0

    def copy(self, data: bytes) -> None:
        """Append bytes of any alignment in memory."""
        for start in range(0, len(data), BLOCK // 2):
            self.write(memoryview(data)[start : start + BLOCK // 2])

    def write(self, view: memoryview) -> None:
        """Append bytes; whole blocks are written in place, so memory must be aligned as the file is."""
        if self.carry:
            head = view[: BLOCK - len(self.carry)]
            self.carry += head
            view = view[len(head) :]
            if len(self.carry) == BLOCK:
                self.block[:] = bytes(self.carry)
                self._write_blocks(memoryview(self.block))
                self.carry.clear()
        whole = len(view) - len(view) % BLOCK
        self._write_blocks(view[:whole])
        self.carry += view[whole:]

    def _write_blocks(self, view: memoryview) -> None:
        """Write whole blocks, with several requests in flight to keep the disk busy."""
        starts = range(0, len(view), REQUEST)
        requests = [self.requests.submit(self._write_at, view[s : s + REQUEST], self.done + s) for s in starts]
        for request in requests:
            request.result()
        self.done += len(view)

    def _write_at(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self.descriptor, view, offset)
            view, offset = view[count:], offset + count

    def tail(self) -> tuple[int, memoryview]:
        """The offset of the last, unfilled block, and its bytes."""
        return self.done, memoryview(bytes(self.carry))

    def close(self) -> None:
        """Close the file, complete or not."""
        self.requests.shutdown()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
