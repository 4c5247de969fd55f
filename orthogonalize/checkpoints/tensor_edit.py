"""How an edit changes one tensor.

With `M h = h - u (v^T h) + s` at a write site, a stored matrix becomes `W - u (v^T W)` along its
stream axis and its bias `b - u (v^T b) + s`; an embedding row is a vector of the stream itself.
At a read site the norm stands between: `W D M D^-1`, with D the norm's weight. `exact` says so in
float64, as a reference; `rounding` computes and rounds what is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Site
from .rounding.base import EditStats, Scales, VectorKernel
from .rounding.registry import DEFAULT_ROUNDING, ROUNDING_SCHEMES


@dataclass(frozen=True)
class TensorRecord:
    """What an edit did to one tensor, for the recipe.

    `leak` is the share of the edit along its directions that rounding lost: with c the component that the
    map looks at (`v^T W`, or `W D u` for a read; along the shift for a pure shift), it is
    `|c(W') - c(exact)| / |c(exact) - c(W)|` (Frobenius), which for a projection is `|v^T W'| / |v^T W|`.
    None where the edit had nothing to change there. `change` is `|W' - W| / |W|`.
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

    def vectors_map(self) -> AffineMap:
        """The edit as a map of the tensor's own vectors, `x - u (v^T x) + s`: what rounding keeps is `v^T x`.

        A pure shift is kept along itself.
        """
        u, v, s = (t.to("cpu", torch.float64) for t in (self.affine.u, self.affine.v, self.affine.s))
        if self.part == "read":
            assert self.norm is not None
            scale = self.norm.to("cpu", torch.float64)
            inverse = torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))
            return AffineMap(inverse.unsqueeze(-1) * v, scale.unsqueeze(-1) * u, torch.zeros_like(s))
        if self.part == "matrix":
            s = torch.zeros_like(s)
        if not self.affine.rank and s.any():
            return AffineMap(torch.zeros_like(s).unsqueeze(-1), (s / s.norm()).unsqueeze(-1), s)
        return AffineMap(u, v, s)

    def component(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of `weight` that the map looks at, [..., k] with the stream axis taken out, in float64."""
        return weight.to(torch.float64).movedim(self.axis, -1) @ self.vectors_map().v

    def layout(self, shape: Sequence[int]) -> VectorLayout:
        """How a tensor of `shape` lies in memory as vectors of the stream."""
        axis = self.axis % len(shape)
        return VectorLayout(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))

    def kernel(self, dtype: torch.dtype, rounding: str) -> VectorKernel:
        """The edit with its rounding (a name in `ROUNDING_SCHEMES`), to be applied to a tensor of `dtype` in chunks."""
        return ROUNDING_SCHEMES.find(rounding).load()(self.vectors_map(), dtype)

    def record(self, measured: EditStats, dtype: torch.dtype) -> TensorRecord:
        """What was measured over the whole tensor, for the recipe.

        Raises:
            OrthogonalizeError: the tensor held NaN or infinite values, or a result does not fit its format.
        """
        if not math.isfinite(measured.before):
            raise OrthogonalizeError(f"{self.name} holds NaN or infinite values; the checkpoint is damaged")
        if measured.beyond or not math.isfinite(measured.change):
            raise OrthogonalizeError(f"the edit of {self.name} overflows {dtype}; use a smaller strength or length")
        leak = math.sqrt(measured.lost / measured.wanted) if measured.wanted else None
        change = math.sqrt(measured.change / measured.before) if measured.before else 0.0
        return TensorRecord(self.name, str(self.site), leak, change)

    def apply(
        self, weight: torch.Tensor, rounding: str = DEFAULT_ROUNDING, scales: Scales | None = None
    ) -> tuple[torch.Tensor, TensorRecord]:
        """The edited tensor in the dtype of `weight`, and what was measured.

        Raises:
            OrthogonalizeError: `weight` holds NaN or infinite values, or a result does not fit its dtype.
        """
        edited = weight.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        layout, edit = self.layout(weight.shape), self.kernel(weight.dtype, rounding)
        measured = EditStats()
        for matrix in edited.reshape(layout.matrices, *layout.matrix):
            numbers = to_numbers(matrix)
            measured = measured.plus(edit(numbers, layout.by_rows, 0, layout.count, scales))
            from_numbers(numbers, matrix)
        return edited, self.record(measured, weight.dtype)


@dataclass(frozen=True)
class VectorLayout:
    """A tensor as `before` x `width` x `after` numbers, of which the middle axis is the stream."""

    before: int
    width: int
    after: int

    @property
    def by_rows(self) -> bool:
        """Whether the vectors are contiguous; the tensor is then one matrix of rows."""
        return self.after == 1

    @property
    def matrices(self) -> int:
        """How many matrices, each contiguous."""
        return 1 if self.by_rows else self.before

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of one matrix."""
        return (self.before, self.width) if self.by_rows else (self.width, self.after)

    @property
    def count(self) -> int:
        """The vectors of one matrix."""
        return self.before if self.by_rows else self.after


def to_numbers(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A contiguous tensor as the numbers that `VectorEdit` takes; shared memory for bfloat16 and float64."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    wide = torch.float64 if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    return tensor.to(wide).numpy()


def from_numbers(numbers: np.ndarray[Any, Any], tensor: torch.Tensor) -> None:
    """Put edited numbers back into the tensor that they came from."""
    if tensor.dtype not in (torch.bfloat16, torch.float64):
        tensor.copy_(torch.from_numpy(numbers))
