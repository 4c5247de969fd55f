"""Read the tensors of a block from a remote file in few requests: what stands side by side comes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.safetensors_file import RemoteFile

SPAN = 2**28  # most bytes of one request that brings several tensors


@dataclass
class _Span:
    """Bytes `start` to `end` of a file, fetched when the first of them are read, and forgotten with the last."""

    start: int
    end: int
    data: bytearray | None = None
    left: int = 0  # bytes that are still to be read
    lock: Lock = field(default_factory=Lock)


class AheadFile:
    """A remote file whose announced parts are fetched together (see `RemoteFile`)."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._spans: list[_Span] = []

    @property
    def size(self) -> int:
        """See `RemoteFile`."""
        return self._file.size

    @property
    def sha256(self) -> str:
        """See `RemoteFile`."""
        return self._file.sha256

    def download(self, folder: Path, going_on: Callable[[], None]) -> Path:
        """See `RemoteFile`."""
        return self._file.download(folder, going_on)

    def announce(self, parts: Iterable[tuple[int, int]]) -> None:
        """Say which parts (first byte, and the one behind the last) are going to be read, each of them once."""
        spans: list[_Span] = []
        for start, end in sorted(parts):
            if not spans or start != spans[-1].end or end - spans[-1].start > SPAN:
                spans.append(_Span(start, start))
            spans[-1].end = end
            spans[-1].left += end - start
        self._spans = spans

    def read_into(self, start: int, view: memoryview) -> None:
        """See `RemoteFile`."""
        end = start + len(view)
        span = next((each for each in self._spans if each.start <= start and end <= each.end), None)
        if span is None:
            self._file.read_into(start, view)
            return
        with span.lock:
            if span.data is None:
                span.data = bytearray(span.end - span.start)
                self._file.read_into(span.start, memoryview(span.data))
            view[:] = memoryview(span.data)[start - span.start : end - span.start]
            span.left -= len(view)
            if span.left <= 0:
                self._spans = [each for each in self._spans if each is not span]


def reading_ahead(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with remote files that take announcements."""
    files = {
        name: file if file.remote is None else replace(file, remote=AheadFile(file.remote))
        for name, file in checkpoint.files.items()
    }
    return replace(checkpoint, files=files)


def announce(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Say that these tensors of a checkpoint (see `reading_ahead`) are going to be read."""
    wanted = set(names)
    for file in checkpoint.files.values():
        if isinstance(file.remote, AheadFile):
            infos = [info for name, info in file.tensors.items() if name in wanted and info.size]
            file.remote.announce([(file.data_start + info.start, file.data_start + info.end) for info in infos])
