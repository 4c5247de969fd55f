"""Write one weight file in a single overlapped pass: read, edit, round, write, and hash source and result.

The file is processed in chunks of tens of megabytes: one thread reads and hashes the source, a pool edits
vectors, one thread writes and hashes the result, and the disk is kept busy meanwhile. The chunks, and so
every result, depend on the tensors alone, never on threads or timing.
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
from ..core.files import CALL, write_all
from ..core.progress import Progress
from . import chunks
from .chunks import Chunk, Job, byte_ranges, split_job
from .direct_io import BLOCK, DirectStream
from .safetensors_file import DTYPES, TensorFile, header_bytes
from .tensor_edit import TensorRecord, from_numbers, to_numbers

AHEAD = 3  # chunks read ahead, and chunks waiting to be written
DIRECT = 2**28  # smallest file, in bytes, that is written past the page cache
FLUSH = 256 * 2**20  # bytes after which a flush to disk is started
TASKS = 8  # parts of a matrix that are edited in parallel


class StoppedError(Exception):
    """Another file failed, so this one is abandoned."""


class FileWriter:
    """Writes one weight file of the result from its source; `jobs` are its tensors, `pool` runs the edits."""

    def __init__(self, file: TensorFile, target: Path, jobs: Sequence[Job], pool: ThreadPoolExecutor) -> None:
        self.file, self.target, self.jobs, self.pool = file, target, jobs, pool
        self.read_hash, self.written_hash = hashlib.sha256(), hashlib.sha256()
        self.spare: deque[torch.Tensor] = deque()
        self.direct: DirectStream | None = None
        self.unflushed = 0
        self.flushing: Future[None] | None = None

    def run(self, advance: Progress, stop: threading.Event, record: Callable[[TensorRecord], None]) -> tuple[str, str]:
        """Write the file and return the SHA-256 of the source and of the result."""
        with ExitStack() as stack:
            self.source = os.open(self.file.path, os.O_RDONLY)
            stack.callback(os.close, self.source)
            self.out = os.open(self.target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(os.close, self.out)
            reader, writer, self.disk, self.read_hasher, self.written_hasher = (
                stack.enter_context(ThreadPoolExecutor(1)) for _ in range(5)
            )
            self._write_header()
            ahead: deque[tuple[Chunk, Future[None]]] = deque()
            behind: deque[Future[None]] = deque()
            coming = (chunk for job in self.jobs for chunk in split_job(job))
            try:
                while True:
                    while len(ahead) < AHEAD and (chunk := next(coming, None)):
                        ahead.append((chunk, reader.submit(self._read, chunk)))
                    if not ahead:
                        break
                    if stop.is_set():
                        raise StoppedError
                    chunk, reading = ahead.popleft()
                    reading.result()
                    if chunk.hashing is not None:
                        chunk.hashing.result()
                    self._edit(chunk, record)
                    behind.append(writer.submit(self._write, chunk))
                    if len(behind) > AHEAD:
                        behind.popleft().result()
                    advance(chunk.size if chunk.columns is None else sum(size for _, size in byte_ranges(chunk)))
                for writing in behind:
                    writing.result()
                if self.direct is not None:
                    write_all(self.out, *self.direct.tail())
                os.fsync(self.out)
            except BaseException:
                for _, reading in ahead:
                    reading.cancel()
                raise
            finally:
                if self.direct is not None:
                    self.direct.close()
        return self.read_hash.hexdigest(), self.written_hash.hexdigest()

    def _write_header(self) -> None:
        """Write the header: the source's bytes if nothing was added or renamed, else a new one."""
        old = bytearray(self.file.data_start)
        self._read_into(self.source, 0, memoryview(old))
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
            write_all(self.out, 0, memoryview(new))

    def _may_be_direct(self) -> bool:
        """Whether the file is large, its chunks come in file order, and its numbers are aligned in memory."""
        aligned = all(
            (self.data_start + job.info.start) % (DTYPES[job.info.dtype].itemsize if job.edit else 1) == 0
            for job in self.jobs
        )
        large = sum(job.info.size for job in self.jobs) >= DIRECT
        return large and aligned and not any(chunk.columns for job in self.jobs for chunk in split_job(job))

    def _read_into(self, descriptor: int, offset: int, view: memoryview) -> None:
        while view:
            count = os.preadv(descriptor, [view[:CALL]], offset)
            if not count:
                raise OrthogonalizeError(f"{self.file.path} was truncated while it was being read; fetch it again")
            view, offset = view[count:], offset + count

    def _read(self, chunk: Chunk) -> None:
        job = chunk.job
        size = sum(size for _, size in byte_ranges(chunk))
        chunk.data = self._take_buffer(size, self.data_start + job.info.start + chunk.start)
        view = memoryview(chunk.data.numpy())
        if chunk.columns is not None and chunk.first and job.inherited:
            assert isinstance(job.origin, int)
            hashing = self.read_hasher.submit(self._hash, self.source, job.origin, job.info.size, self.read_hash)
            hashing.result()
        for start, count in byte_ranges(chunk):
            if isinstance(job.origin, int):
                self._read_into(self.source, job.origin + start, view[:count])
            else:
                view[:count] = job.origin[start : start + count]
            view = view[count:]
        if job.inherited and chunk.columns is None:
            chunk.hashing = self.read_hasher.submit(self.read_hash.update, chunk.data.numpy())
        if job.replaced is not None:
            if chunk.hashing is not None:
                chunk.hashing.result()
            memoryview(chunk.data.numpy())[:] = job.replaced[chunk.start : chunk.start + chunk.size]

    def _take_buffer(self, size: int, place: int) -> torch.Tensor:
        """A buffer for a chunk at `place` in the file; buffers are reused, since new pages cost as much as a copy.

        Its alignment in memory is that of the chunk in the file, so that it can be written directly.
        """
        fresh = size > chunks.WHOLE or not self.spare
        buffer = torch.empty(max(size, chunks.WHOLE) + BLOCK, dtype=torch.uint8) if fresh else self.spare.popleft()
        skip = (place - buffer.data_ptr()) % BLOCK if self.direct is not None else 0
        return buffer[skip : skip + size]

    def _hash(self, descriptor: int, offset: int, size: int, digest: Any) -> None:
        """Hash a range of a file whose chunks do not come in byte order."""
        buffer = memoryview(bytearray(min(chunks.CHUNK, size)))
        for start in range(offset, offset + size, chunks.CHUNK):
            part = buffer[: min(chunks.CHUNK, offset + size - start)]
            self._read_into(descriptor, start, part)
            digest.update(part)

    def _edit(self, chunk: Chunk, record: Callable[[TensorRecord], None]) -> None:
        job = chunk.job
        if job.edit is None:
            return
        assert job.kernel is not None
        layout, dtype = job.layout, DTYPES[job.info.dtype]
        values = chunk.data.view(dtype)
        if chunk.columns is not None:
            matrices = values.view(1, layout.width, chunk.columns[1])
        elif layout.by_rows:
            matrices = values.view(1, -1, layout.width)
        else:
            matrices = values.view(-1, layout.width, layout.after)
        count = matrices.shape[1 if layout.by_rows else 2]
        step = max(64, -(-count // TASKS))
        for number, matrix in enumerate(matrices):
            numbers = to_numbers(matrix)
            given = job.edit.components(chunk.first_vector + number * count, count)
            scales = job.scales_of(chunk.first_vector + number * count, count)
            parts = [
                self.pool.submit(job.kernel, numbers, layout.by_rows, first, min(first + step, count), scales, given)
                for first in range(0, count, step)
            ]
            for part in parts:
                job.stats = job.stats.plus(part.result())
            from_numbers(numbers, matrix)
        if chunk.last:
            record(job.edit.record(job.stats, dtype))

    def _write(self, chunk: Chunk) -> None:
        job = chunk.job
        view = memoryview(chunk.data.numpy())
        start = self.data_start + job.info.start
        if self.direct is not None:
            hashing = self.written_hasher.submit(self.written_hash.update, view)
            self.direct.write(view)
            hashing.result()
            self._return_buffer(chunk)
            return
        for offset, count in byte_ranges(chunk):
            write_all(self.out, start + offset, view[:count])
            view = view[count:]
        if chunk.columns is None:
            self.written_hash.update(chunk.data.numpy())
        elif chunk.last:
            self._hash(self.out, start, job.info.size, self.written_hash)
        self.unflushed += len(chunk.data)
        self._return_buffer(chunk)
        if self.unflushed > FLUSH and (self.flushing is None or self.flushing.done()):
            self.unflushed = 0
            self.flushing = self.disk.submit(os.fsync, self.out)

    def _return_buffer(self, chunk: Chunk) -> None:
        storage = chunk.data.untyped_storage()
        chunk.data = None
        if storage.size() == chunks.WHOLE + BLOCK:
            self.spare.append(torch.empty(0, dtype=torch.uint8).set_(storage))
