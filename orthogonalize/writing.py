"""Writing an edited checkpoint in one pass: read, edit, round, write and both checksums, overlapped.

A weight file goes through in pieces of some ten megabytes: one thread reads and hashes what is stored,
a pool edits vectors, one thread writes and hashes the result, and the disk is kept busy meanwhile. The
pieces, and with them every result, depend on the tensors alone, never on threads or timing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from fcntl import ioctl
from mmap import mmap
from pathlib import Path
from typing import Any

import torch

from .checkpoint import INDEX, Addition, Checkpoint, Progress, read_json
from .errors import OrthogonalizeError
from .rounding import Measured, Scales, VectorEdit
from .tensoredits import Layout, Rounding, TensorEdit, TensorRecord, from_numbers, to_numbers
from .tensorfile import DTYPES, TensorFile, TensorInfo, header_bytes, stored_bytes

PIECE = 32 * 2**20  # bytes read, edited and written at a time
WHOLE = 2 * PIECE  # a matrix up to this size is one piece; a larger one is cut across its columns
RUN = 4096  # bytes of a row, at least, that such a cut takes
AHEAD = 3  # pieces read before they are needed, and written after
REQUEST = 8 * 2**20  # bytes that are written at once past the page cache
BLOCK = 4096  # bytes: what is written past the page cache begins and ends at multiples of it
DIRECT = 2**28  # bytes from which on a file is written past the page cache, which it would only fill
CALL = 2**20  # bytes a system call moves: more would push what it copies out of the nearer caches
FLUSH = 256 * 2**20  # bytes after which the disk is told to begin
TASKS = 8  # parts of a matrix that may be edited at once
CLONE = 0x40049409  # the ioctl FICLONE: two files share their blocks until one changes


@dataclass
class _Job:
    """One tensor of the file to be written, where its bytes come from, and what is done to them."""

    info: TensorInfo
    origin: int | memoryview  # an offset in the source file, or the bytes themselves
    inherited: bool  # whether the source file has these bytes here
    edit: TensorEdit | None = None
    kernel: VectorEdit | None = None
    scales: Scales | None = None
    replaced: memoryview | None = None
    measured: Measured = field(default_factory=Measured)

    @property
    def layout(self) -> Layout:
        assert self.edit is not None
        return self.edit.layout(self.info.shape)


@dataclass
class _Piece:
    """Bytes `start` to `start + size` of a job's tensor, or some columns of one matrix of it.

    `columns` (first, count) are those of the matrix that `start` and `size` span.
    """

    job: _Job
    start: int
    size: int
    columns: tuple[int, int] | None = None
    first: bool = False
    last: bool = False
    data: Any = None  # torch.uint8, what was read and then edited
    hashing: Future[None] | None = None  # of what was read, to be awaited before it is edited


def _pieces(job: _Job) -> Iterator[_Piece]:
    """The pieces of a job's tensor, in the file's order."""
    size = job.info.size
    if not size:
        return
    if job.edit is None:
        step = PIECE
    else:
        layout, item = job.layout, DTYPES[job.info.dtype].itemsize
        line = layout.width * item
        matrix = line if layout.by_rows else line * layout.after
        if matrix > WHOLE and not layout.by_rows:
            yield from _column_pieces(job, layout, matrix, max(RUN // item, PIECE // line))
            return
        step = max(1, PIECE // matrix) * matrix
    for start in range(0, size, step):
        count = min(step, size - start)
        yield _Piece(job, start, count, first=start == 0, last=start + count == size)


def _column_pieces(job: _Job, layout: Layout, matrix: int, columns: int) -> Iterator[_Piece]:
    for start in range(0, job.info.size, matrix):
        for column in range(0, layout.after, columns):
            count = min(columns, layout.after - column)
            last = start + matrix == job.info.size and column + count == layout.after
            yield _Piece(job, start, matrix, (column, count), start == 0 and column == 0, last)


def _spans(piece: _Piece) -> Iterator[tuple[int, int]]:
    """The contiguous runs of bytes of a piece, as (offset in the tensor, size)."""
    if piece.columns is None:
        yield piece.start, piece.size
        return
    layout, item = piece.job.layout, DTYPES[piece.job.info.dtype].itemsize
    first, count = piece.columns
    for row in range(layout.width):
        yield piece.start + (row * layout.after + first) * item, count * item


class _StoppedError(Exception):
    """Another file failed; this one need not be finished."""


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


class _FileWriter:
    """One weight file, from its source to its place in the result."""

    def __init__(self, file: TensorFile, target: Path, jobs: Sequence[_Job], pool: ThreadPoolExecutor) -> None:
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
            ahead: deque[tuple[_Piece, Future[None]]] = deque()
            behind: deque[Future[None]] = deque()
            pieces = (piece for job in self.jobs for piece in _pieces(job))
            try:
                while True:
                    while len(ahead) < AHEAD and (piece := next(pieces, None)):
                        ahead.append((piece, reader.submit(self._read, piece)))
                    if not ahead:
                        break
                    if stop.is_set():
                        raise _StoppedError
                    piece, reading = ahead.popleft()
                    reading.result()
                    if piece.hashing is not None:
                        piece.hashing.result()
                    self._edit(piece, record)
                    behind.append(writer.submit(self._write, piece))
                    if len(behind) > AHEAD:
                        behind.popleft().result()
                    advance(piece.size if piece.columns is None else sum(size for _, size in _spans(piece)))
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
        """The header: as it was where nothing was added, else made anew."""
        old = bytearray(self.file.data_start)
        self._fill(self.source, 0, memoryview(old))
        self.read_hash.update(old)
        inherited = all(job.inherited for job in self.jobs)
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
        return large and aligned and not any(piece.columns for job in self.jobs for piece in _pieces(job))

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

    def _read(self, piece: _Piece) -> None:
        job = piece.job
        size = sum(size for _, size in _spans(piece))
        piece.data = self._take(size, self.data_start + job.info.start + piece.start)
        view = memoryview(piece.data.numpy())
        if piece.columns is not None and piece.first and job.inherited:
            assert isinstance(job.origin, int)
            hashing = self.read_hasher.submit(self._hash, self.source, job.origin, job.info.size, self.read_hash)
            hashing.result()
        for start, count in _spans(piece):
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
        fresh = size > WHOLE or not self.spare
        buffer = torch.empty(max(size, WHOLE) + BLOCK, dtype=torch.uint8) if fresh else self.spare.popleft()
        skip = (place - buffer.data_ptr()) % BLOCK if self.direct is not None else 0
        return buffer[skip : skip + size]

    def _hash(self, descriptor: int, offset: int, size: int, digest: Any) -> None:
        """Feed a span of a file to `digest`, where its pieces come in another order than its bytes."""
        buffer = memoryview(bytearray(min(PIECE, size)))
        for start in range(offset, offset + size, PIECE):
            part = buffer[: min(PIECE, offset + size - start)]
            self._fill(descriptor, start, part)
            digest.update(part)

    def _edit(self, piece: _Piece, record: Callable[[TensorRecord], None]) -> None:
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

    def _write(self, piece: _Piece) -> None:
        job = piece.job
        view = memoryview(piece.data.numpy())
        start = self.data_start + job.info.start
        if self.direct is not None:
            hashing = self.written_hasher.submit(self.written_hash.update, view)
            self.direct.write(view)
            hashing.result()
            self._give_back(piece)
            return
        for offset, count in _spans(piece):
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

    def _give_back(self, piece: _Piece) -> None:
        storage = piece.data.untyped_storage()
        piece.data = None
        if storage.size() == WHOLE + BLOCK:
            self.spare.append(torch.empty(0, dtype=torch.uint8).set_(storage))


def copy_file(source: Path, target: Path, link: bool = False) -> None:
    """Copy a file by the cheapest way that the file system has: shared blocks, or a copy by the kernel.

    With `link` the two become one file under two names, where that is possible.
    """
    source = source.resolve()  # the Hub's cache holds links to its files
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
                    raise OrthogonalizeError(f"{source} became shorter while it was copied; fetch it again")
                left -= count
        except OSError:
            if left != size:
                raise
            shutil.copyfileobj(old, new, PIECE)
        os.fsync(new.fileno())


def _copy_whole(file: TensorFile, target: Path, link: bool, advance: Progress) -> tuple[str, str]:
    """Copy a weight file in which nothing is edited, and hash it meanwhile."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as copier:
        copying = copier.submit(copy_file, file.path, target, link)
        with file.path.open("rb", buffering=0) as source:
            buffer = bytearray(PIECE)
            while count := source.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                advance(count)
        copying.result()
    return digest.hexdigest(), digest.hexdigest()


@dataclass(frozen=True)
class Written:
    """SHA-256 by weight file of what was read and of what was written, and what was done to each tensor."""

    source: dict[str, str]
    result: dict[str, str]
    records: dict[str, TensorRecord]


@dataclass(frozen=True)
class Changes:
    """What is done to the tensors of a checkpoint, by name, and how to round.

    `scales` are those of edited FP8 tensors, `replaced` tensors that get other values altogether.
    """

    edits: Mapping[str, TensorEdit]
    additions: Mapping[str, Addition]
    scales: Mapping[str, Scales] = field(default_factory=dict)
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rounding: Rounding = "cancelling"

    @property
    def names(self) -> set[str]:
        """Every tensor that changes."""
        return {*self.edits, *self.replaced}


def _jobs(source: Checkpoint, file: TensorFile, changes: Changes, additions: Mapping[str, Addition]) -> list[_Job]:
    """The tensors of the new file: the old ones where they were, additions behind."""
    jobs = [
        _Job(info, file.data_start + info.start, True) for info in sorted(file.tensors.values(), key=lambda t: t.start)
    ]
    end = max((info.end for info in file.tensors.values()), default=0)
    for name, addition in additions.items():
        info = TensorInfo(name, addition.dtype, addition.shape, end, end + addition.size)
        jobs.append(_Job(info, _addition_bytes(source, file, name, addition), False))
        end += addition.size
    for job in jobs:
        job.edit = changes.edits.get(job.info.name)
        if job.edit is not None:
            job.kernel = job.edit.rounded(DTYPES[job.info.dtype], changes.rounding)
            job.scales = changes.scales.get(job.info.name)
        if job.info.name in changes.replaced:
            job.replaced = stored_bytes(changes.replaced[job.info.name])
    return jobs


def _addition_bytes(source: Checkpoint, file: TensorFile, name: str, addition: Addition) -> int | memoryview:
    """Where an addition's bytes are: in this very file, where they are a copy of a tensor of it, else in memory."""
    if addition.copy_of is not None and addition.copy_of in file.tensors:
        return file.data_start + file.tensors[addition.copy_of].start
    tensor = addition.make()
    if tensor.shape != addition.shape or tensor.dtype != DTYPES[addition.dtype]:
        raise AssertionError(f"the addition of {name} has another shape or dtype than it said")
    return stored_bytes(tensor)


def write_weights(
    source: Checkpoint,
    target: Path,
    changes: Changes,
    progress: Progress | None = None,
    *,
    names: Sequence[str] | None = None,
    workers: int = 1,
    link: bool = False,
    expected: Mapping[str, str] | None = None,
) -> Written:
    """Write the weight files of `source`, edited, into the empty folder `target`.

    `names` are the files to write (all of them by default), `workers` how many at a time. Files in which
    nothing is edited are copied, or linked with `link`. `expected` are the SHA-256 that the source must have.

    Raises:
        OrthogonalizeError: a tensor cannot be edited, or the source is not the one expected.
    """
    home = source.home(changes.additions)
    lock, stop = threading.Lock(), threading.Event()
    written = Written({}, {}, {})

    def advance(count: int) -> None:
        if stop.is_set():
            raise _StoppedError
        if progress:
            with lock:
                progress(count)

    def record(entry: TensorRecord) -> None:
        written.records[entry.name] = entry

    def write(name: str) -> None:
        try:
            write_one(name)
        except BaseException:
            stop.set()
            raise

    def write_one(name: str) -> None:
        file = source.files[name]
        here = dict(changes.additions) if name == home else {}
        if here or changes.names & file.tensors.keys():
            jobs = _jobs(source, file, changes, here)
            hashes = _FileWriter(file, target / name, jobs, pool).run(advance, stop, record)
        else:
            hashes = _copy_whole(file, target / name, link, advance)
        written.source[name], written.result[name] = hashes
        if expected is not None and expected.get(name) != hashes[0]:
            raise OrthogonalizeError(f"{source.path} is not the base that the recipe was made from: {name} differs")

    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool, ThreadPoolExecutor(workers) as files:
        futures = [files.submit(write, name) for name in sorted(source.files) if names is None or name in names]
        try:
            _wait(futures)
        finally:
            stop.set()
            for future in futures:
                future.cancel()
    return written


def _wait(futures: Sequence[Future[None]]) -> None:
    """Wait for all; raise what went wrong first, and not what stopped because of it."""
    stopped: BaseException | None = None
    for future in futures:
        try:
            future.result()
        except _StoppedError as error:
            stopped = error
    if stopped is not None:
        raise stopped


def write_rest(
    source: Checkpoint, target: Path, additions: Mapping[str, Addition], config_changes: Mapping[str, Any]
) -> None:
    """Write all of a checkpoint but its weights: index, configuration and side files, unchanged where they can be."""
    if source.indexed and additions:
        index = read_json(source.path / INDEX)
        index["weight_map"].update(dict.fromkeys(additions, source.home(additions)))
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
            metadata["total_size"] += sum(addition.size for addition in additions.values())
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=False) + "\n", "utf-8")
    elif source.indexed:
        copy_file(source.path / INDEX, target / INDEX)
    if config_changes:
        text = json.dumps({**source.config, **config_changes}, indent=2, ensure_ascii=False)
        (target / "config.json").write_text(text + "\n", "utf-8")
    else:
        copy_file(source.path / "config.json", target / "config.json")
    for side in source.side_files():
        (target / side).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source.path / side, target / side)
