"""Single entries flipped to their other neighbour, where multipliers are too coarse; compiled (see `kernels`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .gridpoints import factor, other_way, round_row, steps
from .tiles import STEP, add_combination, add_combinations, gathered

FLIPS = 8  # single entries flipped at most, a vector


@njit(nogil=True)
def round_all(y: Any, v: Any, multiplier: Any, scales: Any, every: Any, grid: Any, q: Any) -> None:
    """`q = round(y + v m)`."""
    d = len(y)
    for first in range(0, d, STEP):
        last = min(first + STEP, d)
        rows = q[first:last]
        rows[:] = y[first:last]
        add_combinations(rows, v, first, multiplier)
        for i in range(first, last):
            round_row(q[i], scales, i // every, grid)


@njit(nogil=True)
def best_flips(y: Any, q: Any, v: Any, e: Any, scales: Any, every: Any, grid: Any) -> Any:
    """The entry [n] of every vector whose flip leaves the smallest error, or -1 where none makes it smaller."""
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
def flip_all(y: Any, v: Any, tolerance: Any, scales: Any, every: Any, grid: Any, q: Any, e: Any) -> None:
    """In every vector of `q` that is not within its tolerance, flip the one entry that leaves the smallest error.

    `e` [k, n] is the error `v^T (q - y)` before and after.
    """
    going = np.flatnonzero((e * e).sum(axis=0) > tolerance * tolerance)
    if len(going) == 0:
        return
    if 3 * len(going) <= 2 * y.shape[1]:
        where = best_flips(
            gathered(y, going), gathered(q, going), v, gathered(e, going), gathered(scales, going), every, grid
        )
    else:
        where = best_flips(y, q, v, e, scales, every, grid)[going]
    step = np.empty(1, y.dtype)
    for c in range(len(going)):
        i, j = where[c], going[c]
        if i < 0:
            continue
        steps(
            q[i, j : j + 1], y[i, j : j + 1], None if scales is None else scales[:, j : j + 1], i // every, grid, step
        )
        q[i, j] += step[0]
        for a in range(v.shape[1]):
            e[a, j] += v[i, a] * step[0]


@njit(nogil=True)
def flip_rest(y: Any, v: Any, tolerance: Any, scales: Any, every: Any, grid: Any, q: Any, e: Any) -> None:
    """Flip further entries, one at a time, of the few vectors that are not within their tolerance yet."""
    lowest, unit, _, largest = grid
    d, n = y.shape
    k = v.shape[1]
    for j in range(n):
        for _ in range(FLIPS):
            size = (e[:, j] ** 2).sum()
            if np.sqrt(size) <= tolerance[j]:
                break
            where, move, least = -1, y.dtype.type(0), 0.0
            for i in range(d):
                width = factor(scales, i // every, j, unit)
                step = other_way(q[i, j] / width, y[i, j] / width, lowest, unit) * width
                change = 0.0
                for a in range(k):
                    change += v[i, a] * step * (2 * e[a, j] + v[i, a] * step)
                if change < least and abs(q[i, j] + step) <= largest * width:
                    least, where, move = change, i, step
            if where < 0:
                break
            q[where, j] += move
            for a in range(k):
                e[a, j] += v[where, a] * move
