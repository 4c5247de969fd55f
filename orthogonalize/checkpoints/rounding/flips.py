"""Flip single entries to their other grid neighbour, where multipliers are too coarse; compiled (see `kernels`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .float_grid import round_row, steps
from .tiles import STEP, add_combination, add_combinations, add_squares, copy_rows

FLIPS = 8  # largest number of entries flipped per vector, whatever other vectors are in its tile


@njit(nogil=True)
def round_all(y: Any, v: Any, multiplier: Any, scales: Any, every: Any, grid: Any, q: Any) -> None:
    """`q = round(y + v m)`."""
    d = len(y)
    for first in range(0, d, STEP):
        last = min(first + STEP, d)
        rows = q[first:last]
        copy_rows(y[first:last], rows)
        add_combinations(rows, v, first, multiplier)
        for i in range(first, last):
            round_row(q[i], scales, i // every, grid)


@njit(nogil=True)
def best_flips(y: Any, q: Any, v: Any, e: Any, scales: Any, every: Any, grid: Any) -> Any:
    """The entry [n] of each vector whose flip leaves the smallest error, or -1 if no flip reduces it."""
    d, n = y.shape
    k = v.shape[1]
    least, gain, step = np.zeros(n, y.dtype), np.empty(n, y.dtype), np.empty(n, y.dtype)
    where, narrow = np.full(n, -1, np.int32), (2 * e).astype(y.dtype)
    for i in range(d):
        square = y.dtype.type(0)
        for a in range(k):
            square += v[i, a] * v[i, a]
        gain[:] = 0
        add_combination(gain, v[i], narrow)
        steps(q[i], y[i], scales, i // every, grid, step)
        for j in range(n):
            gain[j] = step[j] * (gain[j] + step[j] * square)
        number = np.int32(i)
        for j in range(n):
            where[j] = number if gain[j] < least[j] else where[j]
        for j in range(n):
            least[j] = min(gain[j], least[j])
    return where


@njit(nogil=True)
def _beyond(e: Any, tolerance: Any) -> Any:
    """The vectors whose error, a column of `e` [k, n], exceeds their `tolerance` [n]."""
    found = []
    for j in range(e.shape[1]):
        size = 0.0
        for a in range(e.shape[0]):
            size += e[a, j] * e[a, j]
        if size > tolerance[j] * tolerance[j]:
            found.append(j)
    return found


@njit(nogil=True)
def flip_all(y: Any, v: Any, tolerance: Any, scales: Any, every: Any, grid: Any, q: Any, e: Any) -> Any:
    """In each vector of `q` beyond its tolerance, flip the one entry that leaves the smallest error.

    `e` [k, n] is the error `v^T (q - y)`, updated in place. If such vectors are few, they are left to `flip_rest`.
    Returns how many flips are left per vector.
    """
    going = _beyond(e, tolerance)
    if 3 * len(going) <= 2 * y.shape[1]:
        return FLIPS
    where = best_flips(y, q, v, e, scales, every, grid)
    step = np.empty(1, y.dtype)
    for j in going:
        i = where[j]
        if i < 0:
            continue
        scale = None if scales is None else scales[:, j : j + 1]
        steps(q[i, j : j + 1], y[i, j : j + 1], scale, i // every, grid, step)
        q[i, j] += step[0]
        for a in range(v.shape[1]):
            e[a, j] += v[i, a] * step[0]
    return FLIPS - 1


@njit(nogil=True)
def _entry_scales(scales: Any, every: Any, j: Any, d: Any) -> Any:
    """The scale of every entry of vector `j`, [1, d]; None if there are no scales."""
    if scales is None:
        return None
    result = np.empty((1, d), scales.dtype)
    for i in range(d):
        result[0, i] = scales[i // every, j]
    return result


@njit(nogil=True)
def flip_rest(
    y: Any, v: Any, flips: Any, tolerance: Any, scales: Any, every: Any, grid: Any, q: Any, e: Any
) -> None:  # fmt: skip
    """Flip up to `flips` more entries, one at a time, in each vector still beyond its tolerance.

    Each vector is copied out of the tile, so that the loops run along its entries.
    """
    d, k = v.shape
    left = _beyond(e, tolerance)
    if len(left) == 0:
        return
    directions, gain, step = v.T.copy(), np.empty(d, y.dtype), np.empty(d, y.dtype)
    squares = np.zeros(d, y.dtype)
    for a in range(k):
        add_squares(directions[a], squares)
    for j in left:
        exact, flipped, widths = y[:, j].copy(), q[:, j].copy(), _entry_scales(scales, every, j, d)
        for _ in range(flips):
            steps(flipped, exact, widths, 0, grid, step)
            gain[:] = 0
            add_combination(gain, (2 * e[:, j]).astype(y.dtype), directions)
            for i in range(d):
                gain[i] = step[i] * (gain[i] + step[i] * squares[i])
            where = np.argmin(gain)
            if gain[where] >= 0:
                break
            flipped[where] += step[where]
            size = 0.0
            for a in range(k):
                e[a, j] += v[where, a] * step[where]
                size += e[a, j] * e[a, j]
            if size <= tolerance[j] * tolerance[j]:
                break
        q[:, j] = flipped
