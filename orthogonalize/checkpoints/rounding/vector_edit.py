"""Edit vectors and round them, to nearest or so that the rounding error has no component along the edited directions.

An edit `y = x - U (V^T x) + s` changes most weights by less than half a unit in the last place of
bfloat16, and plain rounding undoes such changes, always in the direction's favour. The cancelling scheme
rounds every vector to `q` on the storage grid with the least `|q - y|` under `V^T q = V^T y`. By
Lagrange that is plain rounding of a shifted vector, `q = round(y + V m)`, with one multiplier `m` per
direction and vector. Fixed-point iteration finds it (the slope of `V^T q` in `m` is `V^T V` on
average); then single best flips of an entry to its other neighbour cancel what is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...core.interventions import AffineMap
from .arguments import check_given, check_scales, check_vectors
from .base import GRIDS, EditStats, Grid, Scales
from .kernels import edit_tiles

# Errors that need no further work, relative to a typical change of a component; for rank 1, and for higher ranks.
ENOUGH = (2e-6, 8e-4)


def cancelling(affine: AffineMap, dtype: torch.dtype) -> VectorEdit:
    """The edit `affine` of vectors stored in `dtype`, whose components along `v` survive rounding."""
    return VectorEdit(affine, dtype, cancels=True)


def nearest(affine: AffineMap, dtype: torch.dtype) -> VectorEdit:
    """The edit `affine` of vectors stored in `dtype`, rounded to nearest."""
    return VectorEdit(affine, dtype, cancels=False)


class VectorEdit:
    """`x -> x - u (v^T x) + s` on the vectors of a tensor, rounded to `dtype` (float64: not at all).

    `cancels` keeps the components along `v`; otherwise rounding is to nearest. A `VectorKernel`.
    """

    def __init__(self, affine: AffineMap, dtype: torch.dtype, cancels: bool) -> None:
        u, v, s = affine.u, affine.v, affine.s
        if u.dim() != 2 or v.shape != u.shape or s.shape != u.shape[:1]:
            raise ValueError(f"not the map of one vector: u {tuple(u.shape)}, v {tuple(v.shape)}, s {tuple(s.shape)}")
        wide, grid = dtype in (torch.float32, torch.float64), GRIDS.get(dtype)
        number: Any = np.float64 if wide else np.float32
        self._held = np.dtype(np.uint16 if dtype == torch.bfloat16 else number)
        digits = 52 if wide else 23
        limits = grid or Grid(digits, -126, float(np.finfo(number).max))
        self._exact = [t.detach().to("cpu", torch.float64).numpy() for t in (u, v, s)]
        self._maps = [np.ascontiguousarray(t, number) for t in self._exact]
        self._inverse = np.linalg.pinv(self._exact[1].T @ self._exact[1]) if v.shape[1] else np.zeros((0, 0))
        self._numbers = tuple(
            number(x) for x in (2.0**limits.lowest, 2.0**-limits.bits, 1.5 * 2.0**digits, limits.largest)
        )
        self._rounds, self._cancels = grid is not None, cancels and grid is not None and v.shape[1] > 0
        self._enough = ENOUGH[0 if v.shape[1] < 2 else 1] * self._typical_change()

    def _typical_change(self) -> float:
        """How far the edit moves a component, where the component of a unit direction is 1 (a shift: its length)."""
        u, v, _ = self._exact
        if not v.shape[1]:
            return 1.0
        lengths = np.linalg.norm(v, axis=0)
        return float(np.linalg.norm((v.T @ u) * lengths if u.any() else lengths) / np.sqrt(v.shape[1]))

    def __call__(
        self,
        stored: np.ndarray[Any, Any],
        by_rows: bool,
        first: int,
        last: int,
        scales: Scales | None = None,
        given: np.ndarray[Any, Any] | None = None,
    ) -> EditStats:
        """Edit the vectors `first` to `last` of `stored`, in place (see `VectorKernel`).

        Raises:
            ValueError: an argument has another shape, format or memory layout than the compiled loops assume.
        """
        u, v, s = self._maps
        check_vectors(stored, by_rows, first, last, len(v), self._held)
        check_given(given, stored, by_rows, v.shape[1])
        check_scales(scales, stored, by_rows)
        sums, before = np.zeros(6), np.empty((v.shape[1], last - first))
        old = None if scales is None else np.ascontiguousarray(scales.values, u.dtype)
        new = old if scales is None or scales.edited is None else np.ascontiguousarray(scales.edited, u.dtype)
        taken = None if given is None else np.ascontiguousarray(given, u.dtype)
        edit_tiles(
            stored, by_rows, first, last, u, v, self._inverse, s, taken, old, new, scales.every if scales else (1, 1),
            self._numbers, self._rounds, self._cancels, self._enough, sums, before,
        )  # fmt: skip
        u, v, s = self._exact
        changed = before if given is None else given[:, first:last]
        sums[3] = np.square((v.T @ s)[:, None] - (v.T @ u) @ changed).sum()
        return EditStats(*sums.tolist())
