"""One weight file in one pass: read, edit, round, write and both checksums, overlapped.

It goes through in pieces of some ten megabytes: one thread reads and hashes what is stored, a pool edits
vectors, one thread writes and hashes the result, and the disk is kept busy meanwhile. The pieces, and with
them every result, depend on the tensors alone, never on threads or timing.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..core.errors import OrthogonalizeError
from ..core.progress import Progress
from . import chunks as pieces
from .chunks import Job, Piece, cut, spans
from .direct_io import BLOCK, DirectStream
from .safetensors_file import DTYPES, TensorFile, header_bytes
from .tensor_edit import TensorRecord, from_numbers, to_numbers

AHEAD = 3  # pieces read before they are needed, and written after
DIRECT = 2**28  # bytes from which on a file is written past the page cache
CALL = 2**20  # bytes a system call moves: more would push what it copies out of the nearer caches
FLUSH = 256 * 2**20  # bytes after which the disk is told to begin
TASKS = 8  # parts of a matrix that may be edited at once


class StoppedError(Exception):
    """Another file failed; this one need not be finished."""


class FileWriter:
    """One weight file, from its source to its place in the result; its tensors are `jobs`, edited by `pool`."""

    def __init__(self, file: TensorFile, target: Path, jobs: Sequence[Job], pool: ThreadPoolExecutor) -> None:
        self.file, self.target, self.jobs, self.pool = file, target, jobs, pool
        self.read_hash, self.written_hash = hashlib.sha256(), hashlib.sha256()
        self.spare: deque[torch.Tensor] = deque()
        self.direct: DirectStream | None = None
        self.unflushed = 0
        self.flushing: Future[None] | None = None

    def run(self, advance: Progress, stop: threading.Event, record: Callable[[TensorRecord], None]) -> tuple[str, str]:
        """Write the file; the SHA-256 of the source and of the result."""
        with ExitStack() as stack:
            self.source = os.open(self.file.path, os.O_RDONLY)
            stack.callback(os.close, self.source)
            self.out = os.open(self.target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            stack.callback(os.close, self.out)
            reader, writer, self.disk, self.read_hasher, self.written_hasher = (
                stack.enter_context(ThreadPoolExecutor(1)) for _ in range(5)
            )
            self._begin()
            ahead: deque[tuple[Piece, Future[None]]] = deque()
            behind: deque[Future[None]] = deque()
            coming = (piece for job in self.jobs for piece in cut(job))
            try:
                while True:
                    while len(ahead) < AHEAD and (piece := next(coming, None)):
                        ahead.append((piece, reader.submit(self._read, piece)))
                    if not ahead:
                        break
                    if stop.is_set():
                        raise StoppedError
                    piece, reading = ahead.popleft()
                    reading.result()
                    if piece.hashing is not None:
                        piece.hashing.result()
                    self._edit(piece, record)
                    behind.append(writer.submit(self._write, piece))
                    if len(behind) > AHEAD:
                        behind.popleft().result()
                    advance(piece.size if piece.columns is None else sum(size for _, size in spans(piece)))
                for writing in behind:
                    writing.result()
                if self.direct is not None:
                    self._drain(self.out, *self.direct.rest())
                os.fsync(self.out)
            except BaseException:
                for _, reading in ahead:
                    reading.cancel()
                raise
            finally:
                if self.direct is not None:
                    self.direct.close()
        return self.read_hash.hexdigest(), self.written_hash.hexdigest()

    def _begin(self) -> None:
        """The header: as it was where nothing was added or renamed, else made anew."""
        old = bytearray(self.file.data_start)
        self._fill(self.source, 0, memoryview(old))
        self.read_hash.update(old)
        inherited = not self.file.renamed and all(job.inherited for job in self.jobs)
        new = bytes(old) if inherited else header_bytes([job.info for job in self.jobs], self.file.metadata)
        self.written_hash.update(new)
        self.data_start = len(new)
        if self._may_be_direct():
            self.direct = DirectStream(self.target)
        if self.direct is not None and self.direct.usable:
            self.direct.copy(new)
        else:
            self.direct = None
            self._drain(self.out, 0, memoryview(new))

    def _may_be_direct(self) -> bool:
        """Whether the pieces come in the file's order, and where their numbers can be addressed in memory."""
        aligned = all(
            (self.data_start + job.info.start) % (DTYPES[job.info.dtype].itemsize if job.edit else 1) == 0
            for job in self.jobs
        )
        large = sum(job.info.size for job in self.jobs) >= DIRECT
        return large and aligned and not any(piece.columns for job in self.jobs for piece in cut(job))

    def _fill(self, descriptor: int, offset: int, view: memoryview) -> None:
        while view:
            count = os.preadv(descriptor, [view[:CALL]], offset)
            if not count:
                raise OrthogonalizeError(f"{self.file.path} became shorter while it was read; fetch it again")
            view, offset = view[count:], offset + count

    @staticmethod
    def _drain(descriptor: int, offset: int, view: memoryview) -> None:
        while view:
            count = os.pwrite(descriptor, view[:CALL], offset)
            view, offset = view[count:], offset + count

    def _read(self, piece: Piece) -> None:
        job = piece.job
        size = sum(size for _, size in spans(piece))
        piece.data = self._take(size, self.data_start + job.info.start + piece.start)
        view = memoryview(piece.data.numpy())
        if piece.columns is not None and piece.first and job.inherited:
            assert isinstance(job.origin, int)
            hashing = self.read_hasher.submit(self._hash, self.source, job.origin, job.info.size, self.read_hash)
            hashing.result()
        for start, count in spans(piece):
            if isinstance(job.origin, int):
                self._fill(self.source, job.origin + start, view[:count])
            else:
                view[:count] = job.origin[start : start + count]
            view = view[count:]
        if job.inherited and piece.columns is None:
            piece.hashing = self.read_hasher.submit(self.read_hash.update, piece.data.numpy())
        if job.replaced is not None:
            if piece.hashing is not None:
                piece.hashing.result()
            memoryview(piece.data.numpy())[:] = job.replaced[piece.start : piece.start + piece.size]

    def _take(self, size: int, place: int) -> torch.Tensor:
        """Memory for a piece at `place` in the file, used again and again: fresh pages cost as much as a copy.

        It lies in its blocks as the piece lies in those of the file, so that it can be written from there.
        """
        fresh = size > pieces.WHOLE or not self.spare
        buffer = torch.empty(max(size, pieces.WHOLE) + BLOCK, dtype=torch.uint8) if fresh else self.spare.popleft()
        skip = (place - buffer.data_ptr()) % BLOCK if self.direct is not None else 0
        return buffer[skip : skip + size]

    def _hash(self, descriptor: int, offset: int, size: int, digest: Any) -> None:
        """Feed a span of a file to `digest`, where its pieces come in another order than its bytes."""
        buffer = memoryview(bytearray(min(pieces.PIECE, size)))
        for start in range(offset, offset + size, pieces.PIECE):
            part = buffer[: min(pieces.PIECE, offset + size - start)]
            self._fill(descriptor, start, part)
            digest.update(part)

    def _edit(self, piece: Piece, record: Callable[[TensorRecord], None]) -> None:
        job = piece.job
        if job.edit is None:
            return
        assert job.kernel is not None
        layout, dtype = job.layout, DTYPES[job.info.dtype]
        values = piece.data.view(dtype)
        if piece.columns is not None:
            matrices = values.view(1, layout.width, piece.columns[1])
        elif layout.by_rows:
            matrices = values.view(1, -1, layout.width)
        else:
            matrices = values.view(-1, layout.width, layout.after)
        count = matrices.shape[1 if layout.by_rows else 2]
        step = max(64, -(-count // TASKS))
        for matrix in matrices:
            numbers = to_numbers(matrix)
            parts = [
                self.pool.submit(job.kernel, numbers, layout.by_rows, first, min(first + step, count), job.scales)
                for first in range(0, count, step)
            ]
            for part in parts:
                job.measured = job.measured.plus(part.result())
            from_numbers(numbers, matrix)
        if piece.last:
            record(job.edit.record(job.measured, dtype))

    def _write(self, piece: Piece) -> None:
        job = piece.job
        view = memoryview(piece.data.numpy())
        start = self.data_start + job.info.start
        if self.direct is not None:
            hashing = self.written_hasher.submit(self.written_hash.update, view)
            self.direct.write(view)
            hashing.result()
            self._give_back(piece)
            return
        for offset, count in spans(piece):
            self._drain(self.out, start + offset, view[:count])
            view = view[count:]
        if piece.columns is None:
            self.written_hash.update(piece.data.numpy())
        elif piece.last:
            self._hash(self.out, start, job.info.size, self.written_hash)
        self.unflushed += len(piece.data)
        self._give_back(piece)
        if self.unflushed > FLUSH and (self.flushing is None or self.flushing.done()):
            self.unflushed = 0
            self.flushing = self.disk.submit(os.fsync, self.out)

    def _give_back(self, piece: Piece) -> None:
        storage = piece.data.untyped_storage()
        piece.data = None
        if storage.size() == pieces.WHOLE + BLOCK:
            self.spare.append(torch.empty(0, dtype=torch.uint8).set_(storage))
