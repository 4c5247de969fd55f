"""Activations on disk, written while they are captured, so that memory does not grow with the number of prompts.

`activations.safetensors` contains a tensor [prompts, positions, d] for every set of prompts and layer, in the dtype
of the model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.safetensors_file import (
    CHUNK,
    DTYPES,
    TensorFile,
    TensorInfo,
    open_tensor_file,
    stored_bytes,
    write_header,
)
from ..core.errors import OrthogonalizeError
from ..core.files import no_follow, partial_file, write_all
from ..core.interrupts import check
from ..core.journal import Journal
from ..core.progress import track
from ..models.activations import capture, check_finite, check_lengths
from ..models.streaming.lanes import Lane, StreamedModel
from ..models.streaming.passes import Pass
from ..models.streaming.state import StreamState

FILE = "activations.safetensors"
PROMPTS = "prompts"  # the set of a recording of all prompts, before they are divided
STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Recording:
    """The activations of sets of prompts (such as `positive.train`) at all layers, read a layer at a time."""

    file: Path

    def __post_init__(self) -> None:
        if not self.file.is_file():
            raise OrthogonalizeError(f"{self.file} is missing; run extract with --stage activations")

    @cached_property
    def _tensors(self) -> TensorFile:
        return open_tensor_file(self.file)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The stored tensors, called `SET.LAYER`."""
        return self._tensors.tensors

    def _key(self, name: str, layer: int) -> str:
        key = f"{name}.{layer}"
        if key not in self._tensors.tensors:
            raise OrthogonalizeError(f"{self.file} has no activations of {name} at layer {layer}")
        return key

    def read(self, name: str, layer: int, rows: slice = slice(None)) -> torch.Tensor:
        """Activations [prompts, positions, d] of a set at the input of block `layer`, as stored.

        They are copied into memory: the pages of a mapped file would count as this process's until the memory is
        needed elsewhere.
        """
        first, last, _ = rows.indices(self.count(name))
        return self._tensors.rows(self._key(name, layer), first, max(first, last))

    def count(self, name: str) -> int:
        """The number of prompts in a set."""
        return self._tensors.tensors[self._key(name, 0)].shape[0]

    def mean(self, name: str, layer: int) -> torch.Tensor:
        """The mean over the prompts of a set, [positions, d], summed in float64, `ROWS_AT_A_TIME` prompts at a time."""
        count = self.count(name)
        total: torch.Tensor | float = 0.0
        for start in range(0, count, ROWS_AT_A_TIME):
            part = self.read(name, layer, slice(start, start + ROWS_AT_A_TIME))
            total = total + part.to(torch.float64).sum(0)
        return torch.as_tensor(total) / count


class _Writing:
    """The file of a recording while it is written, and the journal of what it has already."""

    def __init__(self, file: Path, infos: Mapping[str, TensorInfo], inputs: Any) -> None:
        self.file, self.infos = file, infos
        self.partial = partial_file(file)  # left by an interrupted call, which this one completes
        self.journal = Journal(file.with_name(f".{file.name}.journal"), inputs)
        if self.partial.is_symlink() or not self.partial.is_file():
            self.partial.unlink(missing_ok=True)
            self.journal.close()  # its file is gone
        self._descriptor, self._start = -1, 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Write in this context; the file is published at its end."""
        with open(self.partial, "r+b" if self.journal.done else "w+b", opener=no_follow) as file:
            write_header(file, list(self.infos.values()), {})
            self._descriptor, self._start = file.fileno(), file.tell()
            file.truncate(self._start + max(info.end for info in self.infos.values()))
            file.flush()
            self._forget_damaged()
            yield
        self.partial.replace(self.file)
        self.journal.close()

    def store(self, key: str, rows: Sequence[int], values: torch.Tensor) -> None:
        """Write the activations [rows, positions, d] of some prompts at one layer."""
        info = self.infos[key]
        for row, value in zip(rows, values.cpu().contiguous(), strict=True):
            data = stored_bytes(value)
            write_all(self._descriptor, self._start + info.start + row * len(data), memoryview(data))

    def finish(self, *steps: str) -> None:
        """Note what is in the file: a prompt at all layers (`SET:ROW`), or all prompts at one (`LAYER`)."""
        self.journal.put({step: self._digest(step) for step in steps})

    def _forget_damaged(self) -> None:
        """Forget the steps whose activations are not those that were written."""
        for step, digest in list(self.journal.done.items()):
            if self._digest(step) != digest:
                del self.journal.done[step]

    def _digest(self, step: str) -> str:
        """SHA-256 of what the file holds of a step."""
        name, _, number = step.rpartition(":")
        digest = hashlib.sha256()
        for key, info in self.infos.items():
            each, _, layer = key.rpartition(".")
            if name and each == name:
                size = info.size // info.shape[0]
                digest.update(os.pread(self._descriptor, size, self._start + info.start + int(number) * size))
            elif not name and layer == number:
                for first in range(info.start, info.end, CHUNK):
                    digest.update(os.pread(self._descriptor, min(CHUNK, info.end - first), self._start + first))
        return digest.hexdigest()


def record(
    model: Any, sets: Mapping[str, Sequence[Sequence[int]]], positions: int, layers: int, folder: Path, inputs: Any
) -> Recording:
    """Store the activations of `sets` of prompts (token ids) in `folder`; resumes an interrupted call.

    Args:
        positions: number of tokens to store, counted from the end of every prompt.
        layers: number of streams to store (blocks + 1).
        inputs: everything that the activations depend on; a call resumes only one with the same inputs.

    Raises:
        OrthogonalizeError: see `activations.capture`.
    """
    shape = model.dtype, model.get_input_embeddings().embedding_dim
    return record_with(partial(capture, model), shape, sets, positions, layers, folder, inputs)


def record_with(
    capture: Callable[[Sequence[Sequence[int]], int], Iterator[tuple[list[int], torch.Tensor]]],
    shape: tuple[torch.dtype, int],
    sets: Mapping[str, Sequence[Sequence[int]]],
    positions: int,
    layers: int,
    folder: Path,
    inputs: Any,
) -> Recording:
    """`record` what `capture(ids, positions)` yields (see `activations.capture`), of this dtype and width."""
    infos = _layout(*shape, {name: len(ids) for name, ids in sets.items()}, positions, layers)
    writing = _Writing(folder / FILE, infos, inputs)
    with writing.opened(), track("reading activations", sum(map(len, sets.values())), "prompts") as advance:
        done = set(writing.journal.done)
        advance(len(done))
        for name, ids in sets.items():
            left = [i for i in range(len(ids)) if f"{name}:{i}" not in done]
            for group, hidden in capture([ids[i] for i in left], positions) if left else ():
                rows = [left[i] for i in group]
                for layer in range(layers):
                    writing.store(f"{name}.{layer}", rows, hidden[:, :, layer])
                writing.finish(*(f"{name}:{row}" for row in rows))
                check()
                advance(len(rows))
    return Recording(folder / FILE)


def _layout(
    dtype: torch.dtype, width: int, counts: Mapping[str, int], positions: int, layers: int
) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    end = 0
    for name, count in counts.items():
        for layer in range(layers):
            begin, end = end, end + count * positions * width * dtype.itemsize
            key = f"{name}.{layer}"
            infos[key] = TensorInfo(key, STORED[dtype], (count, positions, width), begin, end)
    return infos


def record_streamed(
    streamed: StreamedModel, sets: Mapping[str, Sequence[Sequence[int]]], positions: int, file: Path, inputs: Any
) -> Recording:
    """Store what `record` stores in `file`, in one pass over the weights of a model that is never whole in memory.

    An interrupted call resumes at the block that it had come to.
    """
    check_lengths([ids for each in sets.values() for ids in each], positions)
    layers = streamed.layer_count + 1
    counts = {name: len(ids) for name, ids in sets.items()}
    writing = _Writing(file, _layout(streamed.dtype, streamed.width, counts, positions, layers), inputs)
    state = StreamState(file.with_name(f".{file.name.removeprefix('.')}.streams.partial"), inputs)

    def take(layer: int, lanes: Mapping[str, list[Lane]]) -> None:
        for name, each in lanes.items():
            for lane in each:
                here = lane.last(positions)
                check_finite(layer, here)
                writing.store(f"{name}.{layer}", lane.rows, here)
        writing.finish(str(layer))

    with writing.opened():
        if any(str(layer) not in writing.journal for layer in range(state.layer)):
            state.close()  # what it would go on from is not in the file
        Pass(streamed, {name: ids for name, ids in sets.items() if ids}, state=state, take=take).run(
            "reading activations"
        )
    state.close()
    return Recording(file)


def copy_rows(source: Recording, rows: Mapping[str, Sequence[int]], file: Path) -> Recording:
    """Make a recording in `file` of sets of prompts of another one.

    Args:
        source: a recording with the single set `PROMPTS`.
        rows: by set of the new recording, the numbers of its prompts in the old one.
    """
    infos = source.tensors
    layers = range(len(infos))
    _, positions, width = infos[f"{PROMPTS}.0"].shape
    dtype = DTYPES[infos[f"{PROMPTS}.0"].dtype]
    counts = {name: len(numbers) for name, numbers in rows.items()}
    writing = _Writing(file, _layout(dtype, width, counts, positions, len(layers)), "copy")
    with writing.opened():
        for layer in layers:
            values = source.read(PROMPTS, layer)
            for name, numbers in rows.items():
                writing.store(f"{name}.{layer}", range(len(numbers)), values[list(numbers)])
    return Recording(file)
