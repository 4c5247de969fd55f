"""A safetensors file: validate its header, read and write its tensors one at a time.

The safetensors library saves a whole file from memory; editing a checkpoint needs access tensor by
tensor, so headers and offsets are handled here. The format: 8 bytes of header length (little-endian),
a JSON header, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch

from ..core.errors import OrthogonalizeError

MAX_HEADER = 100_000_000  # bytes; the library's own limit
CHUNK = 16 * 2**20  # bytes copied at a time
FIRST = 2**17  # bytes of a remote file that are asked for at first: most headers fit
BLOCK = 2**22  # entries processed at a time

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# By format, the integers that hold its bits, and the least of those of infinity or NaN, without the sign.
NOT_FINITE: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF << 52),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E4M3": (np.uint8, 0x7F),
    "F8_E5M2": (np.uint8, 0x7C),
}
SCANNED = 2**22  # numbers that are looked at at a time
# Every format that the library knows. Those not in DTYPES cannot be edited: their sizes are checked, and they are
# copied.
BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "U32": 32, "U64": 64, "C64": 64,
}  # fmt: skip
EDITABLE = ("F64", "F32", "F16", "BF16")


def show_shape(shape: Sequence[int]) -> str:
    """A shape for a message, shortened if it has many axes."""
    text = str(list(shape[:8]))
    return text if len(shape) <= 8 else f"{text[:-1]}, … ({len(shape)} axes)]"


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor in its file: `start` and `end` are byte offsets in the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    def split(self, parts: Mapping[str, int]) -> dict[str, TensorInfo]:
        """Split the tensor by rows into `parts`: names, and how many rows each gets.

        Raises:
            ValueError: the numbers of rows do not add up.
        """
        row = self.size // self.shape[0]
        ends = list(accumulate(parts.values(), initial=0))
        if ends[-1] != self.shape[0]:
            raise ValueError(f"{self.name} has {self.shape[0]} rows, and its parts have {ends[-1]}")
        return {
            name: TensorInfo(
                name, self.dtype, (rows, *self.shape[1:]), self.start + row * first, self.start + row * last
            )
            for (name, rows), (first, last) in zip(parts.items(), pairwise(ends), strict=True)
        }


class RemoteFile(Protocol):
    """A file that is not on this disk, and is read where it is.

    `size` is in bytes, and `sha256` what its server says.
    """

    @property
    def size(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `start` on.

        Raises:
            OrthogonalizeError: they cannot be read, or the file has changed.
        """
        ...

    def download(self, folder: Path, going_on: Callable[[], None]) -> Path:
        """Write the whole file into `folder`, and return its path there.

        Raises:
            OrthogonalizeError: see `read_into`; and what `going_on` raises, which is called between its pieces.
        """
        ...


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been validated against the length of the file.

    Attributes:
        path: where it lies, or would lie if it is `remote`.
        renamed: whether `tensors` have other names, or are split differently, than in the header on disk.
        remote: where it is read from, if it is not on this disk.
    """

    path: Path
    data_start: int
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    renamed: bool = False
    remote: RemoteFile | None = None

    @property
    def size(self) -> int:
        """The length of the file in bytes."""
        return self.data_start + max((info.end for info in self.tensors.values()), default=0)

    @contextmanager
    def on_disk(self, folder: Path, going_on: Callable[[], None]) -> Iterator[TensorFile]:
        """The file on this disk: itself, or a download in `folder`, which is deleted behind (see `RemoteFile`)."""
        if self.remote is None:
            yield self
            return
        with TemporaryDirectory(prefix=".download-", dir=folder) as own:
            yield replace(self, path=self.remote.download(Path(own), going_on), remote=None)

    def split(self, parts: Mapping[str, Mapping[str, int]]) -> TensorFile:
        """The same file with each tensor in `parts` split by rows: names, and how many rows each gets.

        Rows are contiguous, so no byte of the data section moves.
        """
        if not parts.keys() & self.tensors.keys():
            return self
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.tensors.items():
            tensors |= info.split(parts[name]) if name in parts else {name: info}
        return replace(self, tensors=tensors, renamed=True)

    def not_finite(self, names: Iterable[str]) -> list[str]:
        """Those of the tensors `names` that hold NaN or infinite values; formats without any do not count."""
        found = []
        for name in names:
            info = self.tensors[name]
            if info.size and info.dtype in NOT_FINITE:
                numbers, least = NOT_FINITE[info.dtype]
                data = np.memmap(self.path, numbers, "r", self.data_start + info.start, info.size // numbers().itemsize)
                unsigned = numbers(np.iinfo(numbers).max // 2)  # all bits but the sign
                parts = (data[first : first + SCANNED] for first in range(0, len(data), SCANNED))
                if any((part & unsigned).max() >= least for part in parts):
                    found.append(name)
        return found

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` in its stored dtype, in newly allocated memory."""
        info = self.tensors[name]
        found = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        self._read_into(name, 0, stored_bytes(found))
        return found

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` of tensor `name`, along its first axis, in its stored dtype."""
        info = self.tensors[name]
        row = info.size // info.shape[0] if info.shape[0] else 0
        buffer = bytearray((last - first) * row)
        self._read_into(name, first * row, memoryview(buffer))
        dtype, shape = DTYPES[info.dtype], (last - first, *info.shape[1:])
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape) if buffer else torch.empty(shape, dtype=dtype)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The stored bytes of `name`, in chunks."""
        size = self.tensors[name].size
        for start in range(0, size, CHUNK):
            buffer = bytearray(min(CHUNK, size - start))
            self._read_into(name, start, memoryview(buffer))
            yield bytes(buffer)

    def _read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of tensor `name` from its byte `start` on."""
        place = self.data_start + self.tensors[name].start + start
        if self.remote is not None:
            self.remote.read_into(place, view)
            return
        with self.path.open("rb") as file:
            file.seek(place)
            if view and file.readinto(view) != len(view):
                raise OrthogonalizeError(
                    f"{self.path} is truncated: {name} ends before the offset in its header; fetch the file again"
                )


def _bad(path: Path, why: str) -> OrthogonalizeError:
    return OrthogonalizeError(f"{path} is not a valid safetensors file: {why}; fetch it again")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _tensor_info(path: Path, name: str, entry: object, data_size: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"entry {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = all(isinstance(part, list) and all(type(n) is int and n >= 0 for n in part) for part in (shape, offsets))
    if not whole or len(offsets) != 2:
        raise _bad(path, f"entry {name!r} has a shape or offsets that are not whole numbers")
    start, end = offsets
    if not start <= end <= data_size:
        raise _bad(path, f"{name!r} spans bytes {start}-{end} of {data_size}")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _bad(path, f"{name!r} has an unknown number format {dtype!r}")
    bits = 0 if 0 in shape else BITS[dtype]
    for n in shape:
        bits *= n
        if bits > 8 * data_size:  # already too large; the product of a hostile shape could take forever
            break
    if bits != 8 * (end - start):
        raise _bad(path, f"{name!r} claims to be {dtype}{str(shape)[:60]}, but spans {end - start} bytes")
    return TensorInfo(name, dtype, tuple(shape), start, end)


def open_tensor_file(path: Path, remote: RemoteFile | None = None) -> TensorFile:
    """Read and validate the header of `path` without touching the data.

    Args:
        remote: where the file is, if it is not at `path`; only its header is read.

    Raises:
        OrthogonalizeError: the header is truncated, oversized or malformed, or its tensors overlap, leave gaps or
            do not match the data.
    """
    size, text = _read_header(path) if remote is None else _read_remote_header(path, remote)
    length = len(text)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "its metadata is not a table of strings")
    try:
        "".join((*header, *metadata, *metadata.values())).encode()
    except UnicodeEncodeError as error:
        raise _bad(path, "its header contains an unpaired surrogate (invalid Unicode)") from error
    data_size = size - 8 - length
    tensors = {name: _tensor_info(path, name, entry, data_size) for name, entry in header.items()}
    end = 0
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if info.start != end:
            raise _bad(path, f"{info.name!r} starts at byte {info.start} instead of {end}")
        end = info.end
    if end != data_size:
        raise _bad(path, f"its tensors end at byte {end} and its data at {data_size}")
    return TensorFile(path, 8 + length, tensors, metadata, remote=remote)


def _read_header(path: Path) -> tuple[int, bytes]:
    """The size of a file, and its header."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _header_length(path, size, file.read(8))
            return size, file.read(length)
    except OSError as error:
        raise OrthogonalizeError(f"{path} cannot be read: {error.strerror}; fetch it again") from error


def _read_remote_header(path: Path, remote: RemoteFile) -> tuple[int, bytes]:
    start = bytearray(min(FIRST, remote.size))
    remote.read_into(0, memoryview(start))
    length = _header_length(path, remote.size, bytes(start[:8]))
    rest = bytearray(max(0, 8 + length - len(start)))
    if rest:
        remote.read_into(len(start), memoryview(rest))
    return remote.size, bytes(start[8 : 8 + length] + rest)


def _header_length(path: Path, size: int, prefix: bytes) -> int:
    if len(prefix) < 8:
        raise _bad(path, f"it has only {size} bytes")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, MAX_HEADER):
        raise _bad(path, f"its header claims {length} bytes and the file has {size}")
    return int(length)


def stored_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of `tensor` as the file format stores them (row-major, little-endian)."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def header_bytes(tensors: list[TensorInfo], metadata: dict[str, str]) -> bytes:
    """The header for `tensors`, length included; their data must follow in this order, without gaps."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    for info in tensors:
        header[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.start, info.end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_header(file: BinaryIO, tensors: list[TensorInfo], metadata: dict[str, str]) -> None:
    """Write the header (see `header_bytes`) into an open file."""
    file.write(header_bytes(tensors, metadata))


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last) along the first axis of a tensor of `shape`, in blocks of about `BLOCK` entries."""
    rows = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], rows):
        yield first, min(first + rows, shape[0])
