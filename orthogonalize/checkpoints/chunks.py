"""A weight file in pieces: what is read, edited and written at a time, whatever the size of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from .rounding.base import EditStats, Scales, VectorKernel
from .safetensors_file import DTYPES, TensorInfo
from .tensor_edit import TensorEdit, VectorLayout

PIECE = 32 * 2**20  # bytes read, edited and written at a time
WHOLE = 2 * PIECE  # a matrix up to this size is one piece; a larger one is cut across its columns
RUN = 4096  # bytes of a row, at least, that such a cut takes


@dataclass
class Job:
    """One tensor of the file to be written, where its bytes come from, and what is done to them."""

    info: TensorInfo
    origin: int | memoryview  # an offset in the source file, or the bytes themselves
    inherited: bool  # whether the source file has these bytes here
    edit: TensorEdit | None = None
    kernel: VectorKernel | None = None
    scales: Scales | None = None
    replaced: memoryview | None = None
    measured: EditStats = field(default_factory=EditStats)

    @property
    def layout(self) -> VectorLayout:
        assert self.edit is not None
        return self.edit.layout(self.info.shape)


@dataclass
class Piece:
    """Bytes `start` to `start + size` of a job's tensor, or some columns of one matrix of it.

    `columns` (first, count) are those of the matrix that `start` and `size` span.
    """

    job: Job
    start: int
    size: int
    columns: tuple[int, int] | None = None
    first: bool = False
    last: bool = False
    data: Any = None  # torch.uint8, what was read and then edited
    hashing: Future[None] | None = None  # of what was read, to be awaited before it is edited


def cut(job: Job) -> Iterator[Piece]:
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
            yield from _cut_columns(job, layout, matrix, max(RUN // item, PIECE // line))
            return
        step = max(1, PIECE // matrix) * matrix
    for start in range(0, size, step):
        count = min(step, size - start)
        yield Piece(job, start, count, first=start == 0, last=start + count == size)


def _cut_columns(job: Job, layout: VectorLayout, matrix: int, columns: int) -> Iterator[Piece]:
    for start in range(0, job.info.size, matrix):
        for column in range(0, layout.after, columns):
            count = min(columns, layout.after - column)
            last = start + matrix == job.info.size and column + count == layout.after
            yield Piece(job, start, matrix, (column, count), start == 0 and column == 0, last)


def spans(piece: Piece) -> Iterator[tuple[int, int]]:
    """The contiguous runs of bytes of a piece, as (offset in the tensor, size)."""
    if piece.columns is None:
        yield piece.start, piece.size
        return
    layout, item = piece.job.layout, DTYPES[piece.job.info.dtype].itemsize
    first, count = piece.columns
    for row in range(layout.width):
        yield piece.start + (row * layout.after + first) * item, count * item
