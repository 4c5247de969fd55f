"""Activations on disk: written prompt by prompt as they are read, so that no number of prompts fills the memory.

`activations.safetensors` holds a tensor [prompts, positions, d] for every set of prompts and layer, in the
model's own dtype.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .activations import capture
from .errors import OrthogonalizeError
from .progress import track
from .stages import Journal
from .tensorfile import TensorInfo, stored_bytes, write_header

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

    def read(self, name: str, layer: int, rows: slice = slice(None)) -> torch.Tensor:
        """Activations [prompts, positions, d] of a set at the input of block `layer`, as stored."""
        try:
            with safe_open(self.file, "pt") as tensors:
                return tensors.get_slice(f"{name}.{layer}")[rows]  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise OrthogonalizeError(f"{self.file} has no activations of {name} at layer {layer}: {error}") from error

    def count(self, name: str) -> int:
        """How many prompts the set has."""
        try:
            with safe_open(self.file, "pt") as tensors:
                return int(tensors.get_slice(f"{name}.0").get_shape()[0])
        except (SafetensorError, OSError) as error:
            raise OrthogonalizeError(f"{self.file} has no activations of {name}: {error}") from error

    def mean(self, name: str, layer: int) -> torch.Tensor:
        """Mean over the prompts of a set, [positions, d], summed in float64, some rows at a time."""
        count = self.count(name)
        total: torch.Tensor | float = 0.0
        for start in range(0, count, ROWS_AT_A_TIME):
            part = self.read(name, layer, slice(start, start + ROWS_AT_A_TIME))
            total = total + part.to(torch.float64).sum(0)
        return torch.as_tensor(total) / count


def record(
    model: Any, sets: Mapping[str, Sequence[Sequence[int]]], positions: int, layers: int, folder: Path, inputs: Any
) -> Recording:
    """Read the activations of `sets` of prompts (token ids) into `folder`; go on where a killed run was.

    Args:
        positions: how many tokens at the end of every prompt are read.
        layers: how many streams there are to read (blocks + 1).
        inputs: what the activations depend on; only progress made from the same is taken up.

    Raises:
        OrthogonalizeError: see `activations.capture`.
    """
    partial = folder / f".{FILE}.partial"
    journal = Journal(folder / f".{FILE}.journal", inputs)
    done = {key for key in journal.found if partial.is_file()}
    infos = _layout(model, {name: len(ids) for name, ids in sets.items()}, positions, layers)
    with partial.open("r+b" if done else "w+b") as file:
        write_header(file, list(infos.values()), {})
        start = file.tell()
        file.truncate(start + max(info.end for info in infos.values()))
        file.flush()
        with track("reading activations", sum(map(len, sets.values())), "prompts") as advance:
            advance(len(done))
            for name, ids in sets.items():
                left = [i for i in range(len(ids)) if f"{name}:{i}" not in done]
                for group, hidden in _captured(model, [ids[i] for i in left], positions):
                    rows = [left[i] for i in group]
                    _store(file.fileno(), start, infos, name, rows, hidden)
                    journal.put({f"{name}:{row}": 1 for row in rows})
                    advance(len(rows))
    os.replace(partial, folder / FILE)
    journal.close()
    return Recording(folder / FILE)


def _captured(model: Any, ids: Sequence[Sequence[int]], positions: int) -> Iterator[tuple[list[int], torch.Tensor]]:
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
    """Write hidden [rows, positions, layers, d] to the places of prompts `rows`."""
    here = hidden.cpu()
    for layer in range(here.shape[2]):
        info = infos[f"{name}.{layer}"]
        for row, values in zip(rows, here[:, :, layer].contiguous(), strict=True):
            data = stored_bytes(values)
            os.pwrite(descriptor, data, start + info.start + row * len(data))
