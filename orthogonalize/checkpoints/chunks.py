"""Chunks of a weight file: the unit in which tensors of any size are read, edited and written."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from .rounding.base import EditStats, Scales, VectorKernel
from .safetensors_file import DTYPES, TensorInfo
from .tensor_edit import TensorEdit, VectorLayout

CHUNK = 32 * 2**20  # bytes read, edited and written at a time
WHOLE = 2 * CHUNK  # a matrix up to this size is one chunk; a larger one is split by columns
RUN = 4096  # bytes of each row, at least, in a chunk of columns


@dataclass
class Job:
    """One tensor of the file to be written: where its bytes come from, and how they change."""

    info: TensorInfo
    origin: int | memoryview  # an offset in the source file, or the bytes themselves
    inherited: bool  # whether the tensor is in the source file, rather than added
    edit: TensorEdit | None = None
    kernel: VectorKernel | None = None
    scales: Scales | None = None
    replaced: memoryview | None = None
    stats: EditStats = field(default_factory=EditStats)

    @property
    def layout(self) -> VectorLayout:
        assert self.edit is not None
        return self.edit.layout(self.info.shape)

    def scales_of(self, first: int, count: int) -> Scales | None:
        """The scales of `count` vectors, from number `first` of the tensor on."""
        layout = self.layout
        return self.scales and self.scales.of_vectors(first, count, layout.count, layout.matrices)

    def whole_scales(self, vectors: int) -> int:
        """At most so many vectors, and at least one, that share no scale with those behind them."""
        every = self.scales.every[1] if self.scales else 1
        return max(1, vectors // every) * every


@dataclass
class Chunk:
    """Bytes `start` to `start + size` of a job's tensor, or some columns of one of its matrices.

    `columns` (first, count) are columns of the matrix that `start` and `size` span.
    """

    job: Job
    start: int
    size: int
    columns: tuple[int, int] | None = None
    first: bool = False
    last: bool = False
    data: Any = None  # torch.uint8: the bytes as read, later as edited
    hashing: Future[None] | None = None  # of the bytes as read; must finish before they are edited

    @property
    def first_vector(self) -> int:
        """The number of the chunk's first vector among those of the tensor."""
        line = self.job.layout.width * DTYPES[self.job.info.dtype].itemsize
        return self.start // line + (self.columns[0] if self.columns else 0)


def split_job(job: Job) -> Iterator[Chunk]:
    """The chunks of a job's tensor, in the order of the file."""
    size = job.info.size
    if not size:
        return
    if job.edit is None:
        step = CHUNK
    else:
        layout, item = job.layout, DTYPES[job.info.dtype].itemsize
        line = layout.width * item
        matrix = line if layout.by_rows else line * layout.after
        if matrix > WHOLE and not layout.by_rows:
            yield from _split_columns(job, layout, matrix, job.whole_scales(max(RUN // item, CHUNK // line)))
            return
        step = (job.whole_scales(CHUNK // line) if layout.by_rows else max(1, CHUNK // matrix)) * matrix
    for start in range(0, size, step):
        count = min(step, size - start)
        yield Chunk(job, start, count, first=start == 0, last=start + count == size)


def _split_columns(job: Job, layout: VectorLayout, matrix: int, columns: int) -> Iterator[Chunk]:
    for start in range(0, job.info.size, matrix):
        for column in range(0, layout.after, columns):
            count = min(columns, layout.after - column)
            last = start + matrix == job.info.size and column + count == layout.after
            yield Chunk(job, start, matrix, (column, count), start == 0 and column == 0, last)


def byte_ranges(chunk: Chunk) -> Iterator[tuple[int, int]]:
    """The contiguous byte ranges of a chunk, as (offset in the tensor, size)."""
    if chunk.columns is None:
        yield chunk.start, chunk.size
        return
    layout, item = chunk.job.layout, DTYPES[chunk.job.info.dtype].itemsize
    first, count = chunk.columns
    for row in range(layout.width):
        yield chunk.start + (row * layout.after + first) * item, count * item
