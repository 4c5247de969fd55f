"""Activations on disk without a model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from orthogonalize.directions.activation_store import FILE, Recording


def store_recording(folder: Path, **sides: torch.Tensor) -> Recording:
    """Store the train prompts' activations [prompts, positions, layers, d] of `positive` and `negative`."""
    tensors = {
        f"{side}.{split}.{layer}": rows[:, :, layer].contiguous()
        for side, samples in sides.items()
        for split, rows in (("train", samples), ("spare", samples[:0]))
        for layer in range(samples.shape[2])
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE)
    return Recording(folder / FILE)
