"""The directions of a contrast at every (position, layer), and their file format."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..core.errors import OrthogonalizeError
from ..core.files import parse_json, write_atomically
from ..core.interventions import AffineMap, orthonormal
from .finders.registry import FINDERS
from .inlp.nullspace import Subspace
from .leace import Eraser

# Streams that are the same for all prompts (the first layer at a token of the template) have no direction.
NEGLIGIBLE = 1e-6
OWN_FIELDS = ("inlp", "leace", "stability")  # prefixes of the tensors that have their own fields
LARGEST = 2**27  # numbers in a direction or basis from a file


@dataclass(frozen=True)
class Directions:
    """The differences between the two sides at every position and layer, as the finders describe them.

    Layer l is the input of block l; the last layer is the input of the head's norm.

    Attributes:
        positions: token positions, counted from the end of the prompt (-1 is the last token).
        mean_diffs: [positions, layers + 1, d], mean of the positive side minus mean of the negative side, in units of
            the stream. With `extract --mean` they are differences of robust means, with `--orthogonal-to` only what is
            orthogonal to the negative side's mean.
        subspaces: INLP's subspaces by (position, layer); empty without INLP.
        means: [positions, layers + 1, d], arithmetic means over both sides.
        readers: [positions, layers + 1, d], LEACE's v (see `leace.Eraser`); None without LEACE.
        stability: by finder, the cosines [draws, positions, layers + 1] between its first directions for two
            disjoint halves of the prompts (see `stability.split_half_cosines`).
        tensors: the results of other finders, [positions, layers + 1, ...] by `FINDER.KEY`.
        negative_means: [positions, layers + 1, d], means of the negative side; robust with `extract --mean`.
        leace_differences: [positions, layers + 1, d], LEACE's u: the differences of arithmetic means, where
            `mean_diffs` are others; None where they are the same.
    """

    positions: tuple[int, ...]
    mean_diffs: torch.Tensor
    subspaces: dict[tuple[int, int], Subspace] = field(default_factory=dict)
    means: torch.Tensor | None = None
    readers: torch.Tensor | None = None
    stability: dict[str, torch.Tensor] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    negative_means: torch.Tensor | None = None
    leace_differences: torch.Tensor | None = None

    def __repr__(self) -> str:
        finders = ", ".join(name for name, finder in FINDERS.items() if finder.found(self))
        return (
            f"Directions({finders}; positions {self.positions[0]} to {self.positions[-1]}, "
            f"layers 0 to {self.layer_count}, width {self.mean_diffs.shape[-1]})"
        )

    @property
    def layer_count(self) -> int:
        """The number of blocks of the model."""
        return self.mean_diffs.shape[1] - 1

    def check_place(self, position: int | None = None, layer: int | None = None) -> None:
        """Check that the stream was read at `position` and `layer`, where they are given.

        Raises:
            OrthogonalizeError: it was not.
        """
        if layer is not None and not 0 <= layer <= self.layer_count:
            raise OrthogonalizeError(f"the run has no layer {layer}; its layers are 0 to {self.layer_count}")
        if position is not None and position not in self.positions:
            first, last = self.positions[0], self.positions[-1]
            raise OrthogonalizeError(f"the run has no position {position}; it has {first} to {last}")

    def mean_diff(self, position: int, layer: int) -> torch.Tensor:
        """The mean difference [d] at a position (negative) and layer, in float64."""
        return self.mean_diffs[self.positions.index(position), layer].to(torch.float64)

    def mean(self, position: int, layer: int) -> torch.Tensor:
        """The mean activation [d] of both sides at a position and layer, in float64."""
        if self.means is None:
            raise OrthogonalizeError("these directions were stored without means; extract them again")
        return self.means[self.positions.index(position), layer].to(torch.float64)

    def negative_mean(self, position: int, layer: int) -> torch.Tensor:
        """The mean activation [d] of the negative side at a position and layer, in float64."""
        if self.negative_means is None:
            raise OrthogonalizeError(
                "these directions were stored without the negative side's means; extract them again (--force)"
            )
        return self.negative_means[self.positions.index(position), layer].to(torch.float64)

    def difference_basis(self, position: int, layer: int) -> torch.Tensor | None:
        """The unit mean difference [1, d] there; None if it is negligible compared to the largest."""
        return self._unit_difference(self.mean_diffs, position, layer)

    def erased_basis(self, position: int, layer: int) -> torch.Tensor | None:
        """The unit difference [1, d] that LEACE erases there; None if it is negligible compared to the largest."""
        return self._unit_difference(self._erased_differences, position, layer)

    @property
    def leace_erases_mean_diffs(self) -> bool:
        """Whether LEACE erases `mean_diffs`, rather than differences of its own."""
        return self.leace_differences is None

    @property
    def _erased_differences(self) -> torch.Tensor:
        return self.mean_diffs if self.leace_differences is None else self.leace_differences

    def _unit_difference(self, differences: torch.Tensor, position: int, layer: int) -> torch.Tensor | None:
        diff = differences[self.positions.index(position), layer].to(torch.float64)
        typical = differences.norm(dim=-1).max().item()
        return orthonormal(diff[None]) if diff.norm() > NEGLIGIBLE * typical else None

    def basis(self, finder: str, position: int, layer: int, rank: int | None = None) -> torch.Tensor | None:
        """The first `rank` rows of the orthonormal basis [k, d] that `finder` found there; None without a basis there.

        For `leace` this is the direction that it removes, that of the mean difference.
        """
        return FINDERS.find(finder).basis(self, position, layer, rank)

    def eraser(self, position: int, layer: int, orthogonal: bool = False) -> Eraser | None:
        """LEACE's eraser there, or its orthogonal form; None without LEACE, or if the sides do not differ there."""
        if self.readers is None or self.erased_basis(position, layer) is None:
            return None
        index = self.positions.index(position)
        u = self._erased_differences[index, layer].to(torch.float64)
        v = u if orthogonal else self.readers[index, layer].to(torch.float64)
        product = v @ u
        return Eraser(u, v / product, self.mean(position, layer)) if product > 0 else None

    def removal(self, finder: str, position: int, layer: int) -> AffineMap | None:
        """The map that removes everything that `finder` found there; None if it found nothing."""
        return FINDERS.find(finder).removal(self, position, layer)

    def centred(self) -> Directions:
        """The same without their mean over the stream's coordinates, which is what a LayerNorm sees of them."""

        def centre(vectors: torch.Tensor) -> torch.Tensor:
            return vectors - vectors.mean(-1, keepdim=True)

        return replace(
            self,
            mean_diffs=centre(self.mean_diffs),
            subspaces={at: replace(s, basis=orthonormal(centre(s.basis))) for at, s in self.subspaces.items()},
            means=None if self.means is None else centre(self.means),
            readers=None if self.readers is None else centre(self.readers),
            negative_means=None if self.negative_means is None else centre(self.negative_means),
            leace_differences=None if self.leace_differences is None else centre(self.leace_differences),
        )

    def save(self, file: Path) -> None:
        """Write `directions.safetensors`."""
        tensors = {
            "mean_diffs": self.mean_diffs,
            "means": self.means,
            "negative_means": self.negative_means,
            "leace.readers": self.readers,
            "leace.differences": self.leace_differences,
            **self.tensors,
        }
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
            tensors.get("negative_means"),
            tensors.get("leace.differences"),
        )


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        OrthogonalizeError: the file is missing or damaged.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise OrthogonalizeError(f"{file} cannot be read as safetensors: {error}") from error


@dataclass(frozen=True)
class GivenDirection:
    """A direction or basis from a file.

    `basis` [k, d] is orthonormal, `norm` the length of its first vector in the file. `position` and `layer` say where
    it was extracted, if the file says so.
    """

    basis: torch.Tensor
    norm: float
    position: int | None = None
    layer: int | None = None

    def __repr__(self) -> str:
        rank, width = self.basis.shape
        place = f", position {self.position}, layer {self.layer}" if self.layer is not None else ""
        return f"GivenDirection(rank {rank}, width {width}{place})"


def _reference_metadata(file: Path) -> dict[str, Any]:
    metadata = file.with_name("direction_metadata.json")
    return dict(parse_json(metadata.read_text("utf-8"))) if metadata.is_file() else {}


def load_direction(file: Path | str) -> GivenDirection:
    """Read a direction file: safetensors with `direction` [d] or `basis` [k, d], or `direction.pt`.

    `.pt` files are those of the refusal_direction repository. They are unpickled with `weights_only=True`; position
    and layer come from the `direction_metadata.json` in the same folder.

    Raises:
        OrthogonalizeError: the file is missing or unreadable, or its tensor has the wrong shape, is zero or is not
            finite.
    """
    file = Path(file)
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
            raise OrthogonalizeError(f"{file} contains neither 'direction' nor 'basis' (it has: {', '.join(tensors)})")
        vectors = tensors[name]
    if not isinstance(vectors, torch.Tensor) or vectors.dim() not in (1, 2):
        raise OrthogonalizeError(f"{file} must contain one tensor of shape [d] or [k, d]")
    if vectors.numel() > LARGEST:  # a view may have any number of entries, whatever the size of the file
        raise OrthogonalizeError(f"{file} has {vectors.numel()} numbers, and at most {LARGEST} are read")
    if vectors.is_complex():
        raise OrthogonalizeError(f"{file} contains complex numbers; a direction is real")
    rows = vectors.to(torch.float64).reshape(-1, vectors.shape[-1])
    if not torch.isfinite(rows).all() or not rows.any():
        raise OrthogonalizeError(f"{file} contains a direction that is zero, NaN or infinite")
    return GivenDirection(orthonormal(rows), rows[0].norm().item(), metadata.get("pos"), metadata.get("layer"))
