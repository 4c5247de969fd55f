"""What a rounding scheme takes and returns: vectors of stored numbers, their scales, and statistics of the edit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ...core.interventions import AffineMap


class Grid(NamedTuple):
    """The values that a number format can hold: mantissa bits, exponent of the smallest normal, largest value."""

    bits: int
    lowest: int
    largest: float


GRIDS: dict[torch.dtype, Grid] = {
    torch.float32: Grid(23, -126, torch.finfo(torch.float32).max),
    torch.bfloat16: Grid(7, -126, torch.finfo(torch.bfloat16).max),
    torch.float16: Grid(10, -14, 65504.0),
    torch.float8_e4m3fn: Grid(3, -6, 448.0),
    torch.float8_e5m2: Grid(2, -14, 57344.0),
    torch.float4_e2m1fn_x2: Grid(1, 0, 6.0),  # unpacked: one number each
}


class EditStats(NamedTuple):
    """Measurements from editing a tensor's vectors: sums of squares, and one count.

    Over the entries: `before`, their `change`, and the `error` of rounding. Over the components along the
    directions: what the edit `wanted` to change, and how much of that rounding `lost`. `beyond` counts the
    vectors with a value that the format cannot hold.
    """

    before: float = 0.0
    change: float = 0.0
    error: float = 0.0
    wanted: float = 0.0
    lost: float = 0.0
    beyond: float = 0.0

    def plus(self, other: EditStats) -> EditStats:
        """The sums over both."""
        return EditStats(*(a + b for a, b in zip(self, other, strict=True)))


class Scales(NamedTuple):
    """Factors of stored numbers: entry i of vector j is multiplied by `values[i // every[0], j // every[1]]`.

    Those of the matrices of several experts are side by side. `edited` are the factors of the edited numbers, where
    they do not fit under the old ones; None: unchanged.
    """

    values: np.ndarray[Any, Any]
    every: tuple[int, int]
    edited: np.ndarray[Any, Any] | None = None

    def of_vectors(self, first: int, count: int, each: int, matrices: int) -> Scales:
        """The scales of `count` vectors of one matrix, of `matrices` with `each` vectors, from number `first` on.

        The first one must be the first under its scale.
        """
        matrix, start = divmod(first, each)
        begin = matrix * (self.values.shape[1] // matrices) + start // self.every[1]
        end = begin - (-count // self.every[1])
        edited = None if self.edited is None else self.edited[:, begin:end]
        return Scales(self.values[:, begin:end], self.every, edited)


class VectorKernel(Protocol):
    """An edit of vectors with its rounding, for the tensors of one dtype. Called from several threads at once."""

    def __call__(
        self,
        stored: np.ndarray[Any, Any],
        by_rows: bool,
        first: int,
        last: int,
        scales: Scales | None = None,
        given: np.ndarray[Any, Any] | None = None,
    ) -> EditStats:
        """Edit the vectors `first` to `last` of `stored`, in place.

        Args:
            stored: contiguous; its rows are the vectors ([n, d]) if `by_rows`, else its columns ([d, n]). bfloat16
                is held as uint16, float32 and float64 as float64, narrower formats as float32.
            scales: factors of the stored numbers (FP8 and MXFP4 only).
            given: components [k, vectors] to take out instead of `v^T x` (conditional edits only), in float64.
        """
        ...


Implementation = Callable[[AffineMap, torch.dtype], VectorKernel]
"""Gives the kernel of `x -> x - u (v^T x) + s` on vectors [d] that are stored in a dtype."""
