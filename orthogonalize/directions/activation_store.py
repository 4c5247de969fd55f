"""Activations on disk, written while they are captured, so that memory does not grow with the number of prompts.

`activations.safetensors` contains a tensor [prompts, positions, d] for every set of prompts and layer, in the dtype
of the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.safetensors_file import TensorFile, TensorInfo, open_tensor_file, stored_bytes, write_header
from ..core.errors import OrthogonalizeError
from ..core.files import no_follow, partial_file
from ..core.interrupts import check
from ..core.journal import Journal
from ..core.progress import track
from ..models.activations import capture

FILE = "activations.safetensors"
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
    partial = partial_file(folder / FILE)  # left by an interrupted call, which this one completes
    journal = Journal(folder / f".{FILE}.journal", inputs)
    if partial.is_symlink() or not partial.is_file():
        partial.unlink(missing_ok=True)
        journal.close()  # its file is gone
    done = set(journal.done)
    infos = _layout(model, {name: len(ids) for name, ids in sets.items()}, positions, layers)
    with open(partial, "r+b" if done else "w+b", opener=no_follow) as file:
        write_header(file, list(infos.values()), {})
        start = file.tell()
        file.truncate(start + max(info.end for info in infos.values()))
        file.flush()
        with track("reading activations", sum(map(len, sets.values())), "prompts") as advance:
            advance(len(done))
            for name, ids in sets.items():
                left = [i for i in range(len(ids)) if f"{name}:{i}" not in done]
                for group, hidden in _capture_all(model, [ids[i] for i in left], positions):
                    rows = [left[i] for i in group]
                    _store(file.fileno(), start, infos, name, rows, hidden)
                    journal.put({f"{name}:{row}": 1 for row in rows})
                    check()
                    advance(len(rows))
    partial.replace(folder / FILE)
    journal.close()
    return Recording(folder / FILE)


def _capture_all(model: Any, ids: Sequence[Sequence[int]], positions: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    return capture(model, ids, positions) if ids else iter(())


def _layout(model: Any, counts: Mapping[str, int], positions: int, layers: int) -> dict[str, TensorInfo]:
    width = model.get_input_embeddings().embedding_dim
    size = torch.empty((), dtype=model.dtype).element_size()
    infos: dict[str, TensorInfo] = {}
    end = 0
    for name, count in counts.items():
        for layer in range(layers):
            begin, end = end, end + count * positions * width * size
            key = f"{name}.{layer}"
            infos[key] = TensorInfo(key, STORED[model.dtype], (count, positions, width), begin, end)
    return infos


def _store(
    descriptor: int, start: int, infos: Mapping[str, TensorInfo], name: str, rows: list[int], hidden: torch.Tensor
) -> None:
    """Write `hidden` [rows, positions, layers, d] at the offsets of the prompts `rows`."""
    here = hidden.cpu()
    for layer in range(here.shape[2]):
        info = infos[f"{name}.{layer}"]
        for row, values in zip(rows, here[:, :, layer].contiguous(), strict=True):
            data = stored_bytes(values)
            os.pwrite(descriptor, data, start + info.start + row * len(data))
