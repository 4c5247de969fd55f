"""Compiled kernel of `vector_edit`: edit and round vectors one cache-sized tile at a time.

Every vector is computed independently, in a fixed order and without fused multiply-add, so the result does
not depend on threads, on how a tensor is split, or on the processor. Arithmetic is float32 for
formats of up to 16 bits, with sums carried to float64 every 32 terms, which is accurate to 1e-6 of a
typical component. Formats of 32 and 64 bits are computed in float64.

Throughout, `y` [d, n] holds n vectors, `v` [d, k] the directions, `e` [k, n] errors of components,
`multiplier` [k, n] is m, row i of `scales` [., n] applies to rows i * `every` onwards (None: no scales),
and `grid` is the smallest normal value, the unit in the last place of 1, the number that drops everything below
a unit when it is added and subtracted, and the largest value.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from ...core.compiled import compiled
from . import flips, float_grid, multipliers, tiles
from .flips import flip_all, flip_rest, round_all
from .float_grid import round_row, scale_at
from .multipliers import best_multipliers
from .tiles import RUN, STEP, add_components, apply, carry, copy_rows, load, save, tile_scales

VECTORS = 64  # vectors per tile, which then fits in the cache of a core


@njit(nogil=True)
def finish(y: Any, q: Any, rounds: bool, v: Any, scales: Any, every: Any, grid: Any, e: Any, beyond: Any) -> Any:
    """Set `y` to `q`, or to its own rounding if `q` is None, and `e` to the error `v^T (q - y)`.

    `beyond` [n] is set to the amount by which the largest entry of a vector exceeds what its scale can hold.
    Returns the sum of `(q - y)^2`.
    """
    d, n = y.shape
    largest = grid[3]
    rows, partial = np.empty((STEP, n), y.dtype), np.zeros(e.shape, y.dtype)
    square, squares = np.zeros((1, n), y.dtype), np.zeros((1, n))
    e[:] = 0.0
    for first in range(0, d, RUN):
        last = min(first + RUN, d)
        for start in range(first, last, STEP):
            count = min(STEP, last - start)
            for b in range(count):
                i = start + b
                row, old = rows[b], y[i]
                if q is not None:
                    for j in range(n):
                        row[j] = q[i, j]
                else:
                    for j in range(n):
                        row[j] = old[j]
                    if rounds:
                        round_row(row, scales, i // every, grid)
                for j in range(n):
                    beyond[j] = max(beyond[j], abs(old[j]) / scale_at(scales, i // every, j, largest) - largest)
                for j in range(n):
                    new = row[j]
                    row[j] = new - old[j]
                    old[j] = new
                    square[0, j] += row[j] * row[j]
            add_components(partial, v, start, rows, count)
        carry(partial, e)
        carry(square, squares)
    return squares.sum()


def _compiled(sources: str) -> Any:
    """`edit_tiles`, compiled once for these `sources`: numba's cache knows the file of a function, but not of those
    that it calls, unless its key holds a variable of an enclosing function."""

    @compiled(nogil=True)
    def edit_tiles(
        stored: Any, by_rows: bool, first: Any, last: Any, u: Any, v: Any, inverse: Any, s: Any, given: Any,
        scales: Any, rescaled: Any, every: Any, grid: Any, rounds: bool, cancel: bool, enough: Any,
        sums: Any, before: Any,
    ) -> None:  # fmt: skip
        """Edit and round the vectors `first` to `last` of `stored` in place; add their statistics to `sums`.

        The components `given` [k, vectors] are taken out, or the vectors' own if that is None.
        Stored numbers have the scales `scales` before and `rescaled` after. The vectors' components before the edit
        are written to `before` [k, last - first].
        """
        _ = sources
        d, k = v.shape
        length = np.sqrt(np.sum(v * v))
        room = grid[3] * grid[1] / 4  # up to half a unit above the largest value rounds down to it
        x, q = np.empty((d, VECTORS), u.dtype), np.empty((d if cancel else 0, VECTORS), u.dtype)
        for start in range(first, last, VECTORS):
            n = min(VECTORS, last - start)
            if n < VECTORS:
                x, q = np.empty((d, n), u.dtype), np.empty((d if cancel else 0, n), u.dtype)
            tile, former = tile_scales(rescaled, start, n, every[1]), tile_scales(scales, start, n, every[1])
            seen, e, beyond = np.zeros((k, n)), np.zeros((k, n)), np.zeros(n, u.dtype)
            squares = load(stored, start, by_rows, v, former, every[0], x, seen)
            copy_rows(seen, before[:, start - first : start - first + n])
            taken = seen.astype(u.dtype) if given is None else given[:, start : start + n].copy()
            apply(x, u, s, taken)
            if cancel:
                # Relative to a typical component of the vector, or to those that are taken out.
                wanted = k * squares / d if given is None else (taken * taken).sum(0).astype(np.float64)
                tolerance = enough * np.sqrt(wanted)
                # Flips finish errors within their reach: a few times the typical step of a component.
                reach = np.maximum(tolerance, 4 * grid[1] * length * np.sqrt(squares) / d) if k == 1 else tolerance
                multiplier = best_multipliers(x, v, inverse, reach, tile, every[0], grid, e)
                round_all(x, v, multiplier, tile, every[0], grid, q)
                left = flip_all(x, v, tolerance, tile, every[0], grid, q, e)
                flip_rest(x, v, left, tolerance, tile, every[0], grid, q, e)
                sums[2] += finish(x, q, rounds, v, tile, every[0], grid, e, beyond)
            else:
                sums[2] += finish(x, None, rounds, v, tile, every[0], grid, e, beyond)
            sums[0] += squares.sum()
            sums[1] += save(x, start, by_rows, former, tile, every[0], grid, stored)
            sums[4] += (e * e).sum()
            sums[5] += (beyond > room).sum()

    return edit_tiles


def _sources() -> str:
    """SHA-256 of the modules whose loops are compiled into `edit_tiles`."""
    files = [str(module.__file__) for module in (flips, float_grid, multipliers, tiles)]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


edit_tiles = _compiled(_sources())
