"""The streams of an interrupted pass on disk, so that it resumes at the block that it had come to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...checkpoints.safetensors_file import open_tensor_file, stored_bytes
from ...core.errors import OrthogonalizeError
from ...core.files import fingerprint, new_partial_file
from ...core.progress import note

WRITTEN = 0.25  # bytes written per byte of weights read, at most


class StreamState:
    """A file with the stream of every lane at the input of one block.

    Args:
        file: where it lies.
        inputs: everything that the streams depend on; a file made from other inputs is removed.
    """

    def __init__(self, file: Path, inputs: Any) -> None:
        self.file, self._inputs = file, fingerprint(inputs)
        self._unread = 0.0  # bytes of weights since the last writing
        self.layer = self._stored_layer()

    def _stored_layer(self) -> int:
        """The layer that the file has come to; 0 without a usable file."""
        if self.file.is_symlink() or not self.file.is_file():
            return 0
        try:
            stored = open_tensor_file(self.file)
            layer = stored.metadata.get("layer", "")
            streams = {name: _digest(stored.chunks(name)) for name in stored.tensors}
            known = stored.metadata.get("inputs") == self._inputs
            if known and stored.metadata.get("check") == self._check(layer, streams):
                return int(layer)
        except OrthogonalizeError:
            pass
        note(f"{self.file} was made from something else, by another version, or is damaged, and is dropped")
        self.file.unlink()
        return 0

    def _check(self, layer: str, streams: Mapping[str, str]) -> str:
        """A checksum of a layer and the streams there, given by theirs, and of this package's version."""
        return fingerprint([version("orthogonalize"), layer, streams])

    def load(self) -> dict[str, torch.Tensor]:
        """The stored streams by name."""
        stored = open_tensor_file(self.file)
        return {name: stored.read(name) for name in stored.tensors}

    def passed(self, layer: int, weights: int, streams: Mapping[str, torch.Tensor]) -> None:
        """Note that the streams stand at the input of block `layer`, and write them if enough weights were read.

        `weights`: bytes of the block behind them.
        """
        self._unread += weights
        size = sum(each.numel() * each.element_size() for each in streams.values())
        if size > WRITTEN * self._unread:
            return
        self._unread = 0.0
        held = {name: each.cpu().contiguous() for name, each in streams.items()}
        check = self._check(str(layer), {name: _digest([stored_bytes(each)]) for name, each in held.items()})
        with new_partial_file(self.file) as (partial, _):
            save_file(held, partial, {"inputs": self._inputs, "layer": str(layer), "check": check})
            partial.replace(self.file)
        self.layer = layer

    def close(self) -> None:
        """Remove the file: the results of the pass are safe, or not to be trusted."""
        self.file.unlink(missing_ok=True)
        self.layer = 0


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
