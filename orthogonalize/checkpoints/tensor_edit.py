"""The edit of one tensor.

With `M h = h - u (v^T h) + s` at a write site, a stored matrix becomes `W - u (v^T W)` along its
stream axis and its bias `b - u (v^T b) + s`; an embedding row is a vector of the stream itself.
At a read site a norm with weight D comes first, so the matrix becomes `W D M D^-1`. A conditional edit takes given
components out of the matrix instead of its own, `W - u c`. `exact` computes this in
float64, as the reference; `apply` and `kernel` compute and round what is stored (see `rounding`).
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
    map reads (`v^T W`, or `W D u` for a read; along the shift for a pure shift), it is
    `|c(W') - c(exact)| / |c(exact) - c(W)|` (Frobenius), which for a projection is `|v^T W'| / |v^T W|`.
    None if the edit had nothing to change. `change` is `|W' - W| / |W|`.
    """

    name: str
    site: str
    leak: float | None
    change: float


def edit_matrix(weight: torch.Tensor, axis: int, affine: AffineMap) -> torch.Tensor:
    """`W - u (v^T W)` along the stream `axis`, in float64."""
    return affine.linear(weight.to(torch.float64).movedim(axis, -1)).movedim(-1, axis)


def edit_vectors(vectors: torch.Tensor, axis: int, affine: AffineMap) -> torch.Tensor:
    """The full map, shift included, on vectors of the stream (a bias, embedding rows), in float64."""
    return affine(vectors.to(torch.float64).movedim(axis, -1)).movedim(-1, axis)


def edit_reader(weight: torch.Tensor, axis: int, affine: AffineMap, norm: torch.Tensor) -> torch.Tensor:
    """`W D M D^-1` along the stream `axis`, in float64; `norm` [d] is the diagonal of D.

    A coordinate where D is zero is never read, so nothing can be moved out of it: its column stays as it is.
    """
    rows = weight.to(torch.float64).movedim(axis, -1)
    scale = norm.to(torch.float64)
    inverse = torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))
    wide = affine.to(weight.device, torch.float64)
    return (rows - ((rows * scale) @ wide.u) @ (inverse.unsqueeze(-1) * wide.v).mT).movedim(-1, axis)


@dataclass(frozen=True)
class TensorEdit:
    """The edit of one tensor: the map of `site`, applied along the tensor's stream `axis`.

    `part`: `matrix` (writes the stream; no shift), `vectors` (holds vectors of the stream: biases, embedding rows)
    or `read` (reads the stream through a norm with weight `norm` [d]).

    `given` [k, vectors] are components to take out of the vectors of a matrix in place of their own, `v^T W`, in the
    order of the vectors in the tensor (see `layout`).
    """

    name: str
    site: Site
    axis: int
    affine: AffineMap
    part: Literal["matrix", "vectors", "read"]
    norm: torch.Tensor | None = None
    given: torch.Tensor | None = None

    def exact(self, weight: torch.Tensor) -> torch.Tensor:
        """The edited tensor in float64, before rounding."""
        match self.part:
            case "matrix" if self.given is not None:
                rows = weight.to(torch.float64).movedim(self.axis, -1)
                taken = self.given.to(weight.device, torch.float64).mT @ self.affine.u.to(weight.device).mT
                return (rows - taken.reshape(rows.shape)).movedim(-1, self.axis)
            case "matrix":
                return edit_matrix(weight, self.axis, self.affine)
            case "vectors":
                return edit_vectors(weight, self.axis, self.affine)
            case "read":
                assert self.norm is not None
                return edit_reader(weight, self.axis, self.affine, self.norm)

    def vectors_map(self) -> AffineMap:
        """The edit as a map of the tensor's own vectors, `x - u (v^T x) + s`; rounding preserves `v^T` of the result.

        A pure shift is preserved along itself.
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

    def components(self, first: int, count: int) -> np.ndarray[Any, Any] | None:
        """The `given` components [k, count] of the tensor's vectors from `first` on, for a kernel."""
        return None if self.given is None else self.given[:, first : first + count].numpy()

    def component(self, weight: torch.Tensor) -> torch.Tensor:
        """The component of `weight` that the map reads, [..., k] without the stream axis, in float64."""
        return weight.to(torch.float64).movedim(self.axis, -1) @ self.vectors_map().v

    def planned_change(self, before: torch.Tensor) -> torch.Tensor:
        """How far the edit moves the components [..., k] that its map reads, from those `before` it."""
        affine = self.vectors_map()
        given = None if self.given is None else self.given.to(torch.float64).mT.reshape(before.shape)
        taken = (before if given is None else given) @ (affine.v.mT @ affine.u).mT
        return affine.v.mT @ affine.s - taken

    def layout(self, shape: Sequence[int]) -> VectorLayout:
        """The memory layout of a tensor of `shape` as vectors of the stream."""
        axis = self.axis % len(shape)
        return VectorLayout(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))

    def kernel(self, dtype: torch.dtype, rounding: str) -> VectorKernel:
        """The edit with its rounding (a name in `ROUNDING_SCHEMES`), to be applied to a tensor of `dtype` in chunks."""
        return ROUNDING_SCHEMES.find(rounding).load()(self.vectors_map(), dtype)

    def record(self, stats: EditStats, dtype: torch.dtype) -> TensorRecord:
        """The record of the whole tensor, for the recipe.

        Raises:
            OrthogonalizeError: the tensor holds NaN, infinite or huge values, or a result does not fit its format.
        """
        if not math.isfinite(stats.before):
            raise OrthogonalizeError(
                f"{self.name} holds NaN, infinite or huge values (above 1e18); the checkpoint is damaged"
            )
        if stats.beyond or not math.isfinite(stats.change):
            raise OrthogonalizeError(
                f"the edit of {self.name} overflows {dtype}; use a smaller --strength or --coefficient"
            )
        leak = math.sqrt(stats.lost / stats.wanted) if stats.wanted else None
        change = math.sqrt(stats.change / stats.before) if stats.before else 0.0
        return TensorRecord(self.name, str(self.site), leak, change)

    def apply(
        self, weight: torch.Tensor, rounding: str = DEFAULT_ROUNDING, scales: Scales | None = None
    ) -> tuple[torch.Tensor, TensorRecord]:
        """The edited tensor in the dtype of `weight`, and its record.

        Raises:
            OrthogonalizeError: `weight` holds NaN, infinite or huge values, or a result does not fit its dtype.
        """
        edited = weight.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        layout, edit = self.layout(weight.shape), self.kernel(weight.dtype, rounding)
        stats, first = EditStats(), 0
        for matrix in edited.reshape(layout.matrices, *layout.matrix):
            numbers = to_numbers(matrix)
            given = self.components(first, layout.count)
            own = None if scales is None else scales.of_vectors(first, layout.count, layout.count, layout.matrices)
            stats = stats.plus(edit(numbers, layout.by_rows, 0, layout.count, own, given))
            from_numbers(numbers, matrix)
            first += layout.count
        return edited, self.record(stats, weight.dtype)


@dataclass(frozen=True)
class VectorLayout:
    """A tensor as `before` x `width` x `after` numbers; the middle axis is the stream."""

    before: int
    width: int
    after: int

    @property
    def by_rows(self) -> bool:
        """Whether vectors are contiguous; the tensor is then one matrix whose rows they are."""
        return self.after == 1

    @property
    def matrices(self) -> int:
        """The number of matrices, each of them contiguous."""
        return 1 if self.by_rows else self.before

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of one matrix."""
        return (self.before, self.width) if self.by_rows else (self.width, self.after)

    @property
    def count(self) -> int:
        """The number of vectors in one matrix."""
        return self.before if self.by_rows else self.after


def to_numbers(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A contiguous tensor as an array for a `VectorKernel`; bfloat16 and float64 share its memory."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    wide = torch.float64 if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    return tensor.to(wide).numpy()


def from_numbers(numbers: np.ndarray[Any, Any], tensor: torch.Tensor) -> None:
    """Store edited numbers in the tensor that they came from."""
    if tensor.dtype not in (torch.bfloat16, torch.float64):
        tensor.copy_(torch.from_numpy(numbers))
