"""Directions of a contrast at every (position, layer), how they are stored, and how they are read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import OrthogonalizeError
from .interventions import orthonormal
from .nullspace import Subspace, inlp
from .progress import track

# Streams that no prompt can differ in (the first layer at a template's token) have no direction.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Directions:
    """Mean differences and INLP subspaces by position and layer.

    `mean_diffs` is [positions, layers + 1, d], positive minus negative, in units of the stream; layer
    l is the input of block l and the last what the head's norm reads. `positions` are counted from
    the prompt's end. `subspaces` maps (position, layer) to what INLP found there; empty without INLP.
    """

    positions: tuple[int, ...]
    mean_diffs: torch.Tensor
    subspaces: dict[tuple[int, int], Subspace] = field(default_factory=dict)

    @property
    def layer_count(self) -> int:
        return self.mean_diffs.shape[1] - 1

    def mean_diff(self, position: int, layer: int) -> torch.Tensor:
        """The mean difference [d] at a position (negative) and layer, in float64."""
        return self.mean_diffs[self.positions.index(position), layer].to(torch.float64)

    def basis(self, method: str, position: int, layer: int, rank: int | None = None) -> torch.Tensor | None:
        """The orthonormal basis [k, d] that `dim` or `inlp` gives there; None where there is none.

        `rank` keeps INLP's first directions only.
        """
        if method == "dim":
            diff = self.mean_diff(position, layer)
            typical = self.mean_diffs.norm(dim=-1).max().item()
            return orthonormal(diff[None]) if diff.norm() > NEGLIGIBLE * typical else None
        found = self.subspaces.get((position, layer))
        if found is None or not found.rank:
            return None
        return orthonormal(found.basis[:rank])

    def save(self, file: Path) -> None:
        """Write `directions.safetensors`."""
        tensors = {
            "mean_diffs": self.mean_diffs.to(torch.float32).contiguous(),
            "positions": torch.tensor(self.positions),
        }
        for (position, layer), found in self.subspaces.items():
            tensors[f"inlp.{position}.{layer}.basis"] = found.basis.to(torch.float32).contiguous()
            tensors[f"inlp.{position}.{layer}.accuracies"] = torch.tensor(found.accuracies, dtype=torch.float32)
        save_file(tensors, file)

    @classmethod
    def load(cls, file: Path) -> Directions:
        """Read `directions.safetensors`."""
        tensors = read_tensors(file)
        subspaces = {}
        for name, tensor in tensors.items():
            if name.startswith("inlp.") and name.endswith(".basis"):
                _, position, layer, _ = name.split(".")
                accuracies = tensors[f"inlp.{position}.{layer}.accuracies"]
                subspaces[int(position), int(layer)] = Subspace(tensor.to(torch.float64), tuple(accuracies.tolist()))
        return cls(tuple(tensors["positions"].tolist()), tensors["mean_diffs"], subspaces)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        OrthogonalizeError: missing or damaged.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise OrthogonalizeError(f"{file} cannot be read as safetensors: {error}") from error


def all_subspaces(
    positive: torch.Tensor, negative: torch.Tensor, positions: tuple[int, ...], max_rank: int, seed: int
) -> dict[tuple[int, int], Subspace]:
    """INLP at every (position, layer) of activations [n, positions, layers + 1, d]."""
    result: dict[tuple[int, int], Subspace] = {}
    pairs = [(i, layer) for i in range(len(positions)) for layer in range(positive.shape[2])]
    with track("INLP", len(pairs), "pairs") as advance:
        for i, layer in pairs:
            result[positions[i], layer] = inlp(positive[:, i, layer], negative[:, i, layer], max_rank, seed=seed)
            advance(1)
    return result


@dataclass(frozen=True)
class GivenDirection:
    """A direction or basis from a file: `basis` [k, d] orthonormal, with its origin where known."""

    basis: torch.Tensor
    norm: float
    position: int | None = None
    layer: int | None = None


def _reference_metadata(file: Path) -> dict[str, Any]:
    metadata = file.with_name("direction_metadata.json")
    return dict(json.loads(metadata.read_text("utf-8"))) if metadata.is_file() else {}


def load_direction(file: Path) -> GivenDirection:
    """Read a direction file: safetensors with `direction` [d] or `basis` [k, d], or `direction.pt`.

    A `.pt` file is the refusal_direction repository's; it is unpickled with `weights_only=True`, and
    `direction_metadata.json` beside it gives position and layer.

    Raises:
        OrthogonalizeError: no such file, unreadable, of another shape, zero or not finite.
    """
    if not file.is_file():
        raise OrthogonalizeError(f"no such direction file: {file}")
    metadata: dict[str, Any] = {}
    if file.suffix in (".pt", ".pth"):
        try:
            vectors = torch.load(file, map_location="cpu", weights_only=True)
            metadata = _reference_metadata(file)
        except Exception as error:  # torch raises many classes for a bad pickle
            raise OrthogonalizeError(f"{file} cannot be read as a tensor: {str(error).splitlines()[0]}") from error
    else:
        tensors = read_tensors(file)
        name = next((n for n in ("direction", "basis") if n in tensors), None)
        if name is None:
            raise OrthogonalizeError(f"{file} holds neither 'direction' nor 'basis' (it has: {', '.join(tensors)})")
        vectors = tensors[name]
    if not isinstance(vectors, torch.Tensor) or vectors.dim() not in (1, 2):
        raise OrthogonalizeError(f"{file} must hold one tensor of shape [d] or [k, d]")
    rows = vectors.to(torch.float64).reshape(-1, vectors.shape[-1])
    if not torch.isfinite(rows).all() or not rows.any():
        raise OrthogonalizeError(f"{file} holds a direction that is zero, NaN or infinite")
    return GivenDirection(orthonormal(rows), rows[0].norm().item(), metadata.get("pos"), metadata.get("layer"))
