"""Lagrange multipliers of the cancelling scheme, by fixed-point iteration; compiled (see `kernels`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .float_grid import round_number, round_row
from .tiles import RUN, STEP, add_combinations, add_components, carry, copy_rows, select_columns

ITERATIONS = 8  # at most
# For several directions without scales: few vectors are then left, and flips cost less than further iterations.
ITERATIONS_OF_SEVERAL = 3


@njit(nogil=True)
def _errors(y: Any, v: Any, multiplier: Any, plain: bool, scales: Any, every: Any, grid: Any, e: Any) -> None:
    """Set `e` [k, n] to `v^T (round(y + v m) - y)`; `plain`: m is 0."""
    d, n = y.shape
    rows, partial = np.empty((STEP, n), y.dtype), np.zeros(e.shape, y.dtype)
    e[:] = 0.0
    for first in range(0, d, RUN):
        last = min(first + RUN, d)
        for start in range(first, last, STEP):
            count = min(STEP, last - start)
            copy_rows(y[start : start + count], rows)
            if not plain:
                add_combinations(rows[:count], v, start, multiplier)
            for b in range(count):
                row, exact = rows[b], y[start + b]
                round_row(row, scales, (start + b) // every, grid)
                for j in range(n):
                    row[j] -= exact[j]
            add_components(partial, v, start, rows, count)
        carry(partial, e)


@njit(nogil=True)
def _errors_of_one(y: Any, v: Any, multiplier: Any, grid: Any, e: Any) -> None:
    """`_errors` for one direction and no scales, the most common edit, in a single loop."""
    lowest, unit, magic, largest = grid
    d, n = y.shape
    m, partial = multiplier[0], np.zeros((1, n), y.dtype)
    total = partial[0]
    e[:] = 0.0
    for first in range(0, d, RUN):
        last = min(first + RUN, d)
        i = first
        while i + STEP <= last:
            w0, w1, w2, w3 = v[i, 0], v[i + 1, 0], v[i + 2, 0], v[i + 3, 0]
            y0, y1, y2, y3 = y[i], y[i + 1], y[i + 2], y[i + 3]
            for j in range(n):
                r0 = round_number(y0[j] + w0 * m[j], lowest, unit, magic, largest) - y0[j]
                r1 = round_number(y1[j] + w1 * m[j], lowest, unit, magic, largest) - y1[j]
                r2 = round_number(y2[j] + w2 * m[j], lowest, unit, magic, largest) - y2[j]
                r3 = round_number(y3[j] + w3 * m[j], lowest, unit, magic, largest) - y3[j]
                total[j] += (w0 * r0 + w1 * r1) + (w2 * r2 + w3 * r3)
            i += STEP
        while i < last:
            w0, y0 = v[i, 0], y[i]
            for j in range(n):
                total[j] += w0 * (round_number(y0[j] + w0 * m[j], lowest, unit, magic, largest) - y0[j])
            i += 1
        carry(partial, e)


@njit(nogil=True)
def best_multipliers(y: Any, v: Any, inverse: Any, tolerance: Any, scales: Any, every: Any, grid: Any, e: Any) -> Any:
    """The multipliers [k, n] that leave the smallest error; that error is written to `e` [k, n].

    `inverse` is `(V^T V)^-1`. A vector is done when its error is within its `tolerance` [n], or when
    shorter steps no longer help; the iteration continues with the others only.
    """
    k, n = e.shape
    best, least, length = np.zeros((k, n), y.dtype), np.full(n, np.inf), np.ones(n)
    here = np.arange(n)
    trial = np.zeros((k, n), y.dtype)
    for iteration in range(ITERATIONS if k == 1 or scales is not None else ITERATIONS_OF_SEVERAL):
        error = np.empty((k, len(here)))
        if scales is None and k == 1:
            _errors_of_one(y, v, trial, grid, error)
        else:
            _errors(y, v, trial, iteration == 0, scales, every, grid, error)
        going = np.zeros(len(here), np.bool_)
        for c in range(len(here)):
            j = here[c]
            if length[j] == 0.0:
                continue
            size = 0.0
            for a in range(k):
                size += error[a, c] * error[a, c]
            size = np.sqrt(size)
            if size < least[j]:
                least[j] = size
                length[j] = min(1.0, 2.0 * length[j])
                for a in range(k):
                    best[a, j] = trial[a, c]
                    e[a, j] = error[a, c]
            else:
                length[j] *= 0.5
            if least[j] <= tolerance[j] or length[j] < 0.4:
                length[j] = 0.0
                continue
            going[c] = True
            for a in range(k):
                step = 0.0
                for b in range(k):
                    step += inverse[a, b] * e[b, j]
                trial[a, c] = best[a, j] - length[j] * step
        left = np.flatnonzero(going)
        if len(left) == 0:
            break
        if 3 * len(left) <= 2 * len(here):
            y, trial, here = select_columns(y, left), select_columns(trial, left), here[left]
            scales = select_columns(scales, left)
    return best
