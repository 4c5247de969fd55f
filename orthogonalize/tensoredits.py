"""How an edit changes one tensor.

With `M h = h - u (v^T h) + s` at a write site, a stored matrix becomes `W - u (v^T W)` along its
stream axis and its bias `b - u (v^T b) + s`; an embedding row is a vector of the stream itself.
At a read site the norm stands between: `W D M D^-1`, with D the norm's weight. All arithmetic is
float64, rounded once to the stored dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .errors import OrthogonalizeError
from .interventions import AffineMap, Site


@dataclass(frozen=True)
class TensorRecord:
    """What an edit did to one tensor, for the recipe.

    `leak` is `|v^T W'| / |v^T W|` (Frobenius), the share of the written component that is left
    after the edit and its rounding (for reads, `|W' D v| / |W D v|`); None where there was none.
    `change` is `|W' - W| / |W|`.
    """

    name: str
    site: str
    leak: float | None
    change: float


def matrix_written(weight: torch.Tensor, axis: int, affine: AffineMap) -> torch.Tensor:
    """`W - u (v^T W)` along the stream `axis`, in float64."""
    return affine.linear(weight.to(torch.float64).movedim(axis, -1)).movedim(-1, axis)


def vectors_written(vectors: torch.Tensor, axis: int, affine: AffineMap) -> torch.Tensor:
    """The full map, shift included, on vectors of the stream (a bias, embedding rows), in float64."""
    return affine(vectors.to(torch.float64).movedim(axis, -1)).movedim(-1, axis)


def matrix_read(weight: torch.Tensor, axis: int, affine: AffineMap, norm: torch.Tensor) -> torch.Tensor:
    """`W D M D^-1` along the stream `axis`, in float64; `norm` [d] is the diagonal of D.

    A coordinate where D is zero is never read, so nothing can be moved out of it: its column stays.
    """
    rows = weight.to(torch.float64).movedim(axis, -1)
    scale = norm.to(torch.float64)
    inverse = torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))
    wide = affine.to(weight.device, torch.float64)
    return (rows - ((rows * scale) @ wide.u) @ (inverse.unsqueeze(-1) * wide.v).mT).movedim(-1, axis)


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    base = whole.norm().item()
    return part.norm().item() / base if base else None


@dataclass(frozen=True)
class TensorEdit:
    """One tensor's edit: how its stream `axis` meets the map of `site`."""

    name: str
    site: Site
    axis: int
    affine: AffineMap
    part: Literal["matrix", "vectors", "read"]
    norm: torch.Tensor | None = None

    def exact(self, weight: torch.Tensor) -> torch.Tensor:
        """The edited tensor in float64, before rounding."""
        match self.part:
            case "matrix":
                return matrix_written(weight, self.axis, self.affine)
            case "vectors":
                return vectors_written(weight, self.axis, self.affine)
            case "read":
                assert self.norm is not None
                return matrix_read(weight, self.axis, self.affine, self.norm)

    def component(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of `weight` that the map looks at: `v^T W`, or `W D v` for a read."""
        vectors = weight.to(torch.float64).movedim(self.axis, -1)
        return (vectors if self.norm is None else vectors * self.norm.to(torch.float64)) @ self.affine.v

    def apply(self, weight: torch.Tensor) -> tuple[torch.Tensor, TensorRecord]:
        """The edited tensor in the dtype of `weight`, and what was measured.

        Raises:
            OrthogonalizeError: `weight` holds NaN or infinite values.
        """
        if not torch.isfinite(weight).all():
            raise OrthogonalizeError(f"{self.name} holds NaN or infinite values; the checkpoint is damaged")
        edited = self.exact(weight).to(weight.dtype)
        if not torch.isfinite(edited).all():
            raise OrthogonalizeError(
                f"the edit of {self.name} overflows {weight.dtype}; use a smaller strength or length"
            )
        change = _ratio(edited.to(torch.float64) - weight.to(torch.float64), weight.to(torch.float64))
        leak = _ratio(self.component(edited), self.component(weight))
        return edited, TensorRecord(self.name, str(self.site), leak, change or 0.0)
