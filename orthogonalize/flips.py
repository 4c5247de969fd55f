"""Single entries flipped to their other neighbour, where multipliers are too coarse; compiled (see `kernels`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .gridpoints import factor, other_way, round_row, steps
from .tiles import add_combination

FLIPS = 8  # single entries flipped at most, a vector


@njit(nogil=True)
def flip_all(
    y: Any, v: Any, multiplier: Any, tolerance: Any, scales: Any, every: Any, grid: Any, q: Any, e: Any
) -> None:  # fmt: skip
    """`q = round(y + v m)`, then in every vector the one entry flipped that leaves the smallest error.

    `e` [k, n] is the error `v^T (q - y)` before and after. A vector within its tolerance is left alone.
    """
    d, n = y.shape
    k = v.shape[1]
    one = y.dtype.type(1)
    least, gain, step = np.zeros(n, y.dtype), np.empty(n, y.dtype), np.empty(n, y.dtype)
    where, narrow = np.full(n, -1, np.int32), (2 * e).astype(y.dtype)
    going = False
    for j in range(n):
        if np.sqrt((e[:, j] ** 2).sum()) > tolerance[j]:
            going = True
        else:
            least[j] = -np.inf  # the change of |e|^2 that a flip must undercut
    for i in range(d):
        row, exact, number = q[i], y[i], np.int32(i)
        row[:] = exact
        add_combination(row, v[i], multiplier, one)
        round_row(row, scales, i // every, grid)
        if not going:
            continue
        square = y.dtype.type(0)
        for a in range(k):
            square += v[i, a] * v[i, a]
        gain[:] = 0
        add_combination(gain, v[i], narrow, one)
        steps(row, exact, scales, i // every, grid, step)
        for j in range(n):
            gain[j] = step[j] * (gain[j] + step[j] * square)
        for j in range(n):
            where[j] = number if gain[j] < least[j] else where[j]
        for j in range(n):
            least[j] = min(gain[j], least[j])
    for j in range(n):
        i = where[j]
        if i >= 0:
            group = i // every
            steps(q[i], y[i], scales, group, grid, step)
            q[i, j] += step[j]
            for a in range(k):
                e[a, j] += v[i, a] * step[j]


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
