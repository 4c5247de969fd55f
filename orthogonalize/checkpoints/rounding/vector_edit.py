"""Rounding that keeps an edit: the error that storage adds has no component along the edited directions.

An edit `y = x - U (V^T x) + s` changes most weights by less than half a unit in the last place of
bfloat16, and plain rounding takes such changes back, always in the direction's favour. Here every
vector is rounded to `q` on the storage grid with the least `|q - y|` under `V^T q = V^T y`. By
Lagrange that is plain rounding of a shifted vector, `q = round(y + V m)`, with one multiplier `m` a
direction and vector; it is found by fixed-point iteration (the slope of `V^T q` in `m` is `V^T V` on
average), and single best flips of an entry to its other neighbour cancel what the steps are too
coarse for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from .kernels import edit_tiles

# Errors that need no further work, as a share of what an edit typically changes of a component, by rank 1 or more.
ENOUGH = (2e-6, 8e-4)


class Grid(NamedTuple):
    """The values that a number format can hold: mantissa bits, exponent of the least normal, the largest value."""

    bits: int
    lowest: int
    largest: float


GRIDS: dict[torch.dtype, Grid] = {
    torch.float32: Grid(23, -126, torch.finfo(torch.float32).max),
    torch.bfloat16: Grid(7, -126, torch.finfo(torch.bfloat16).max),
    torch.float16: Grid(10, -14, 65504.0),
    torch.float8_e4m3fn: Grid(3, -6, 448.0),
    torch.float8_e5m2: Grid(2, -14, 57344.0),
}


class EditStats(NamedTuple):
    """What was measured while a tensor's vectors were edited: sums of squares, and one count.

    Of the entries: `before`, their `change`, and the `error` of rounding. Of the components along the
    directions: what the edit `wanted` to change, and what rounding `lost` of that. `beyond` counts the
    vectors with a value that the format cannot hold.
    """

    before: float = 0.0
    change: float = 0.0
    error: float = 0.0
    wanted: float = 0.0
    lost: float = 0.0
    beyond: float = 0.0

    def plus(self, other: EditStats) -> EditStats:
        """Both together."""
        return EditStats(*(a + b for a, b in zip(self, other, strict=True)))


class Scales(NamedTuple):
    """Factors of stored numbers: entry i of vector j is multiplied by `values[i // every[0], j // every[1]]`.

    `edited` are the factors of the edited numbers, where the former cannot hold them; None: the same.
    """

    values: np.ndarray[Any, Any]
    every: tuple[int, int]
    edited: np.ndarray[Any, Any] | None = None


class VectorEdit:
    """`x -> x - u (v^T x) + s` on the vectors of a tensor, rounded to `grid` (None: not at all).

    `u` and `v` are [d, k] and `s` is [d]. `cancel` False rounds to nearest; otherwise the components along
    `v` are kept. May be used from several threads.
    """

    def __init__(
        self, u: torch.Tensor, v: torch.Tensor, s: torch.Tensor, grid: Grid | None, cancel: bool, wide: bool
    ) -> None:
        number: Any = np.float64 if wide else np.float32
        digits = 52 if wide else 23
        limits = grid or Grid(digits, -126, float(np.finfo(number).max))
        self._exact = [t.detach().to("cpu", torch.float64).numpy() for t in (u, v, s)]
        self._maps = [np.ascontiguousarray(t, number) for t in self._exact]
        self._inverse = np.linalg.pinv(self._exact[1].T @ self._exact[1]) if v.shape[1] else np.zeros((0, 0))
        self._numbers = tuple(
            number(x) for x in (2.0**limits.lowest, 2.0**-limits.bits, 1.5 * 2.0**digits, limits.largest)
        )
        self._rounds, self._cancels = grid is not None, cancel and grid is not None and v.shape[1] > 0
        self._enough = ENOUGH[0 if v.shape[1] < 2 else 1] * self._typical_change()

    def _typical_change(self) -> float:
        """How far the edit moves a component, where the component of a unit direction is 1 (a shift: its length)."""
        u, v, _ = self._exact
        if not v.shape[1]:
            return 1.0
        lengths = np.linalg.norm(v, axis=0)
        return float(np.linalg.norm((v.T @ u) * lengths if u.any() else lengths) / np.sqrt(v.shape[1]))

    def __call__(
        self, stored: np.ndarray[Any, Any], by_rows: bool, first: int, last: int, scales: Scales | None = None
    ) -> EditStats:
        """Edit the vectors `first` to `last` of `stored`, in place.

        `stored` is contiguous and holds bfloat16 as uint16, or float32 or float64 numbers (as the edit
        was made for); its rows are the vectors ([n, d]), else its columns ([d, n]).
        """
        u, v, s = self._maps
        sums, before = np.zeros(6), np.empty((v.shape[1], last - first))
        former = None if scales is None else np.ascontiguousarray(scales.values, u.dtype)
        latter = former if scales is None or scales.edited is None else np.ascontiguousarray(scales.edited, u.dtype)
        edit_tiles(
            stored, by_rows, first, last, u, v, self._inverse, s, former, latter, scales.every if scales else (1, 1),
            self._numbers, self._rounds, self._cancels, self._enough, sums, before,
        )  # fmt: skip
        u, v, s = self._exact
        sums[3] = np.square((v.T @ s)[:, None] - (v.T @ u) @ before).sum()
        return EditStats(*sums.tolist())
