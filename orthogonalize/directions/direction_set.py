"""Directions of a contrast at every (position, layer), how they are stored, and how they are read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..core.errors import OrthogonalizeError
from ..core.files import write_atomically
from ..core.interventions import AffineMap, orthonormal
from .finders.registry import FINDERS
from .inlp.nullspace import Subspace
from .leace import Eraser

# Streams that no prompt can differ in (the first layer at a template's token) have no direction.
NEGLIGIBLE = 1e-6
OWN_FIELDS = ("inlp", "leace", "stability")  # tensors of these prefixes have fields of their own


@dataclass(frozen=True)
class Directions:
    """What tells the two sides apart at every position and layer: mean differences, INLP subspaces, LEACE erasers.

    `mean_diffs` is [positions, layers + 1, d], positive minus negative, in units of the stream; layer
    l is the input of block l and the last what the head's norm reads. `means` is the mean over both
    sides, in the same places. `positions` are counted from the prompt's end. `subspaces` maps
    (position, layer) to what INLP found there; empty without INLP. `readers` are LEACE's v (see
    `leace.Eraser`), None without it. `stability` gives, for each finder that has one first direction, the cosines
    [seeds, seeds, positions, layers + 1] between the directions of several draws of the prompts. `tensors` are
    what further finders found, [positions, layers + 1, ...] by `FINDER.KEY`.
    """

    positions: tuple[int, ...]
    mean_diffs: torch.Tensor
    subspaces: dict[tuple[int, int], Subspace] = field(default_factory=dict)
    means: torch.Tensor | None = None
    readers: torch.Tensor | None = None
    stability: dict[str, torch.Tensor] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        finders = ", ".join(name for name, finder in FINDERS.items() if finder.found(self))
        return (
            f"Directions({finders}; positions {self.positions[0]} to {self.positions[-1]}, "
            f"layers 0 to {self.layer_count}, width {self.mean_diffs.shape[-1]})"
        )

    @property
    def layer_count(self) -> int:
        return self.mean_diffs.shape[1] - 1

    def mean_diff(self, position: int, layer: int) -> torch.Tensor:
        """The mean difference [d] at a position (negative) and layer, in float64."""
        return self.mean_diffs[self.positions.index(position), layer].to(torch.float64)

    def mean(self, position: int, layer: int) -> torch.Tensor:
        """The mean activation [d] of both sides at a position and layer, in float64."""
        if self.means is None:
            raise OrthogonalizeError("these directions were stored without means; extract again")
        return self.means[self.positions.index(position), layer].to(torch.float64)

    def difference_basis(self, position: int, layer: int) -> torch.Tensor | None:
        """The unit mean difference [1, d] there; None where it is negligible beside the largest."""
        diff = self.mean_diff(position, layer)
        typical = self.mean_diffs.norm(dim=-1).max().item()
        return orthonormal(diff[None]) if diff.norm() > NEGLIGIBLE * typical else None

    def basis(self, finder: str, position: int, layer: int, rank: int | None = None) -> torch.Tensor | None:
        """The orthonormal basis [k, d] that `finder` found there, its first `rank` rows; None where there is none.

        For `leace` this is the direction that it removes, the mean difference's.
        """
        return FINDERS.find(finder).basis(self, position, layer, rank)

    def eraser(self, position: int, layer: int, orthogonal: bool = False) -> Eraser | None:
        """LEACE's eraser there, or its orthogonal form; None where the sides do not differ, or without LEACE."""
        if self.readers is None or self.difference_basis(position, layer) is None:
            return None
        u = self.mean_diff(position, layer)
        v = u if orthogonal else self.readers[self.positions.index(position), layer].to(torch.float64)
        product = v @ u
        return Eraser(u, v / product, self.mean(position, layer)) if product > 0 else None

    def removal(self, finder: str, position: int, layer: int) -> AffineMap | None:
        """The map that removes all that `finder` found there; None where that is nothing."""
        return FINDERS.find(finder).removal(self, position, layer)

    def save(self, file: Path) -> None:
        """Write `directions.safetensors`."""
        tensors = {"mean_diffs": self.mean_diffs, "means": self.means, "leace.readers": self.readers, **self.tensors}
        stored = {name: t.to(torch.float32).contiguous() for name, t in tensors.items() if t is not None}
        stored["positions"] = torch.tensor(self.positions)
        for (position, layer), found in self.subspaces.items():
            name = f"inlp.{position}.{layer}"
            stored[f"{name}.basis"] = found.basis.to(torch.float32).contiguous()
            stored[f"{name}.accuracies"] = torch.tensor(found.accuracies, dtype=torch.float32)
            if found.stopped_at is not None:
                stored[f"{name}.stopped_at"] = torch.tensor(found.stopped_at, dtype=torch.float32)
        for method, cosines in self.stability.items():
            stored[f"stability.{method}"] = cosines.to(torch.float32).contiguous()
        write_atomically(file, save(stored))

    @classmethod
    def load(cls, file: Path) -> Directions:
        """Read `directions.safetensors`."""
        tensors = read_tensors(file)
        subspaces = {}
        for name, tensor in tensors.items():
            if name.startswith("inlp.") and name.endswith(".basis"):
                _, position, layer, _ = name.split(".")
                accuracies = tensors[f"inlp.{position}.{layer}.accuracies"]
                stopped = tensors.get(f"inlp.{position}.{layer}.stopped_at")
                subspaces[int(position), int(layer)] = Subspace(
                    tensor.to(torch.float64), tuple(accuracies.tolist()), None if stopped is None else stopped.item()
                )
        return cls(
            tuple(tensors["positions"].tolist()),
            tensors["mean_diffs"],
            subspaces,
            tensors.get("means"),
            tensors.get("leace.readers"),
            {n.removeprefix("stability."): t for n, t in tensors.items() if n.startswith("stability.")},
            {n: t for n, t in tensors.items() if "." in n and n.partition(".")[0] not in OWN_FIELDS},
        )


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        OrthogonalizeError: missing or damaged.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise OrthogonalizeError(f"{file} cannot be read as safetensors: {error}") from error


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
