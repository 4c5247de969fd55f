"""Tiles of vectors: read, edit and write them, and sum their components; compiled (see `kernels`).

Sums run in the tile's own format for 32 terms and are then carried to float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .float_grid import convert, round_number, scale_at

RUN = 32  # terms summed in the tile's format before the sum is carried to float64
STEP = 4  # rows processed together, so that sums stay in registers; divides RUN


@njit(nogil=True)
def add_combination(row: Any, weights: Any, vectors: Any) -> None:
    """`row` [n] += `weights` [k] `vectors` [k, n]."""
    n = row.shape[0]
    k = weights.shape[0]
    a = 0
    while a + STEP <= k:
        w0, w1, w2, w3 = weights[a], weights[a + 1], weights[a + 2], weights[a + 3]
        for j in range(n):
            row[j] += (w0 * vectors[a, j] + w1 * vectors[a + 1, j]) + (w2 * vectors[a + 2, j] + w3 * vectors[a + 3, j])
        a += STEP
    while a < k:
        w0 = weights[a]
        for j in range(n):
            row[j] += w0 * vectors[a, j]
        a += 1


@njit(nogil=True)
def add_combinations(rows: Any, weights: Any, first: Any, vectors: Any) -> None:
    """`rows` [count, n] += `weights` [first : first + count] `vectors` [k, n]; count is at most 4.

    Four rows and four vectors at a time, so that every number read is used in four products.
    """
    count, n = rows.shape
    k = vectors.shape[0] // STEP * STEP if count == STEP else 0
    for a in range(0, k, STEP):
        w00, w01, w02, w03 = weights[first, a], weights[first, a + 1], weights[first, a + 2], weights[first, a + 3]
        i = first + 1
        w10, w11, w12, w13 = weights[i, a], weights[i, a + 1], weights[i, a + 2], weights[i, a + 3]
        i = first + 2
        w20, w21, w22, w23 = weights[i, a], weights[i, a + 1], weights[i, a + 2], weights[i, a + 3]
        i = first + 3
        w30, w31, w32, w33 = weights[i, a], weights[i, a + 1], weights[i, a + 2], weights[i, a + 3]
        for j in range(n):
            x0, x1, x2, x3 = vectors[a, j], vectors[a + 1, j], vectors[a + 2, j], vectors[a + 3, j]
            rows[0, j] += (w00 * x0 + w01 * x1) + (w02 * x2 + w03 * x3)
            rows[1, j] += (w10 * x0 + w11 * x1) + (w12 * x2 + w13 * x3)
            rows[2, j] += (w20 * x0 + w21 * x1) + (w22 * x2 + w23 * x3)
            rows[3, j] += (w30 * x0 + w31 * x1) + (w32 * x2 + w33 * x3)
    if k < vectors.shape[0]:
        for b in range(count):
            add_combination(rows[b], weights[first + b, k:], vectors[k:])


@njit(nogil=True)
def add_components(partial: Any, v: Any, first: Any, rows: Any, count: Any) -> None:
    """`partial` [k, n] += `v` [first : first + count]^T `rows` [: count]; count is at most 4."""
    n = rows.shape[1]
    k = v.shape[1] // STEP * STEP if count == STEP else 0
    for a in range(0, k, STEP):
        w00, w01, w02, w03 = v[first, a], v[first, a + 1], v[first, a + 2], v[first, a + 3]
        i = first + 1
        w10, w11, w12, w13 = v[i, a], v[i, a + 1], v[i, a + 2], v[i, a + 3]
        i = first + 2
        w20, w21, w22, w23 = v[i, a], v[i, a + 1], v[i, a + 2], v[i, a + 3]
        i = first + 3
        w30, w31, w32, w33 = v[i, a], v[i, a + 1], v[i, a + 2], v[i, a + 3]
        for j in range(n):
            x0, x1, x2, x3 = rows[0, j], rows[1, j], rows[2, j], rows[3, j]
            partial[a, j] += (w00 * x0 + w10 * x1) + (w20 * x2 + w30 * x3)
            partial[a + 1, j] += (w01 * x0 + w11 * x1) + (w21 * x2 + w31 * x3)
            partial[a + 2, j] += (w02 * x0 + w12 * x1) + (w22 * x2 + w32 * x3)
            partial[a + 3, j] += (w03 * x0 + w13 * x1) + (w23 * x2 + w33 * x3)
    for a in range(k, v.shape[1]):
        if count == STEP:
            w0, w1, w2, w3 = v[first, a], v[first + 1, a], v[first + 2, a], v[first + 3, a]
            for j in range(n):
                partial[a, j] += (w0 * rows[0, j] + w1 * rows[1, j]) + (w2 * rows[2, j] + w3 * rows[3, j])
        else:
            for b in range(count):
                w0 = v[first + b, a]
                for j in range(n):
                    partial[a, j] += w0 * rows[b, j]


@njit(nogil=True)
def add_squares(row: Any, squares: Any) -> None:
    """`squares` [n] += `row` [n] squared."""
    for j in range(row.shape[0]):
        squares[j] += row[j] * row[j]


@njit(nogil=True)
def copy_rows(source: Any, target: Any) -> None:
    """Copy `source` to `target`, both [m, n]. A loop, because assigning slices takes seconds to compile."""
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            target[i, j] = source[i, j]


@njit(nogil=True)
def carry(partial: Any, total: Any) -> None:
    """Move the sums in `partial` into the float64 `total`."""
    for a in range(partial.shape[0]):
        for j in range(partial.shape[1]):
            total[a, j] += partial[a, j]
            partial[a, j] = 0


@njit(nogil=True)
def _copy(source: Any, at: Any, target: Any, to: Any, shape: Any) -> None:
    """Copy a block of `shape` from `source` at `at` to `target` at `to`, converting to the target's type."""
    like = target[0, 0]
    for i in range(shape[0]):
        old = source[at[0] + i, at[1] : at[1] + shape[1]]
        new = target[to[0] + i, to[1] : to[1] + shape[1]]
        for j in range(shape[1]):
            new[j] = convert(old[j], like)


@njit(nogil=True)
def _read_strip(stored: Any, start: Any, by_rows: bool, first: Any, strip: Any) -> None:
    """Set `strip` [m, n] to the entries from `first` on of the vectors from `start` on."""
    m, n = strip.shape
    if by_rows:
        _copy(stored, (start, first), strip.T, (0, 0), (n, m))
    else:
        _copy(stored, (first, start), strip, (0, 0), (m, n))


@njit(nogil=True)
def _write_strip(strip: Any, start: Any, by_rows: bool, first: Any, stored: Any) -> None:
    """The inverse of `_read_strip`."""
    m, n = strip.shape
    if by_rows:
        _copy(strip.T, (0, 0), stored, (start, first), (n, m))
    else:
        _copy(strip, (0, 0), stored, (first, start), (m, n))


@njit(nogil=True)
def load(stored: Any, start: Any, by_rows: bool, v: Any, scales: Any, every: Any, x: Any, before: Any) -> Any:
    """Read the tile `x` [d, n] of `stored` from vector `start` on, and write its components to `before` [k, n].

    Returns the squared norm of each vector, [n].
    """
    d, n = x.shape
    partial, squares, square = np.zeros(before.shape, x.dtype), np.zeros((1, n)), np.zeros((1, n), x.dtype)
    for first in range(0, d, RUN):
        last = min(first + RUN, d)
        strip = x[first:last]
        _read_strip(stored, start, by_rows, first, strip)
        for i in range(last - first):
            row = strip[i]
            if scales is not None:
                scale = scales[(first + i) // every]
                for j in range(n):
                    row[j] *= scale[j]
            add_squares(row, square[0])
        for i in range(first, last, STEP):
            count = min(STEP, last - i)
            add_components(partial, v, i, x[i : i + count], count)
        carry(partial, before)
        carry(square, squares)
    return squares[0]


@njit(nogil=True)
def apply(y: Any, u: Any, s: Any, before: Any) -> None:
    """Set `y` to `y - u before + s`."""
    d, n = y.shape
    minus = -before
    for first in range(0, d, STEP):
        last = min(first + STEP, d)
        add_combinations(y[first:last], u, first, minus)
        for i in range(first, last):
            if s[i] != 0:
                for j in range(n):
                    y[i, j] += s[i]


@njit(nogil=True)
def save(q: Any, start: Any, by_rows: bool, before: Any, scales: Any, every: Any, grid: Any, stored: Any) -> Any:
    """Write the tile `q` [d, n] to `stored` from vector `start` on; returns the sum of squared changes.

    The numbers stored there so far have the scales `before`.
    """
    lowest, unit, magic, largest = grid
    d, n = q.shape
    square, squares = np.zeros((1, n), q.dtype), np.zeros((1, n))
    buffer = np.empty((RUN, n), q.dtype)
    for first in range(0, d, RUN):
        last = min(first + RUN, d)
        old = buffer[: last - first]
        _read_strip(stored, start, by_rows, first, old)
        for i in range(last - first):
            row, difference, group = q[first + i], old[i], (first + i) // every
            for j in range(n):
                difference[j] = difference[j] * scale_at(before, group, j, unit) - row[j]
            if scales is not None:
                for j in range(n):
                    row[j] = round_number(row[j] / scales[group, j], lowest, unit, magic, largest)
            add_squares(difference, square[0])
        carry(square, squares)
        _write_strip(q[first:last], start, by_rows, first, stored)
    return squares.sum()


@njit(nogil=True)
def tile_scales(scales: Any, start: Any, n: Any, every: Any) -> Any:
    """The scales of the `n` vectors from `start` on, one column each; None if there are no scales."""
    if scales is None:
        return None
    result = np.empty((scales.shape[0], n), scales.dtype)
    for i in range(scales.shape[0]):
        for j in range(n):
            result[i, j] = scales[i, (start + j) // every]
    return result


@njit(nogil=True)
def select_columns(x: Any, columns: Any) -> Any:
    """The `columns` of `x`; None if `x` is None."""
    if x is None:
        return None
    result = np.empty((x.shape[0], len(columns)), x.dtype)
    for i in range(x.shape[0]):
        for j in range(len(columns)):
            result[i, j] = x[i, columns[j]]
    return result
