"""The loops of `rounding`, compiled: vectors edited and rounded a tile at a time, in the cache of a core.

Every vector is computed on its own, in one order and without fused multiply-add, so the result does
not depend on threads, on how a tensor is cut, or on the processor. Arithmetic is float32 for
formats of 16 bits and fewer, with sums carried in float64 every 32 terms: that is good to 1e-6 of a
typical component. Formats of 32 and 64 bits are computed in float64.

In all of them: `y` [d, n] holds n vectors, `v` [d, k] the directions, `e` [k, n] errors of components,
`multiplier` [k, n] is m, `scales` [., n] multiplies the entries of every `every` rows (None: no scales),
and `grid` is the lowest normal value, the unit of the last place at 1, the number that drops what lies
below a unit when it is added and taken away, and the largest value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

VECTORS = 64  # rounded together: a tile of them stays in the cache of a core
RUN = 32  # terms summed in the narrow format before the sum is carried in float64
STEP = 4  # rows taken at once, so that sums stay in registers; divides RUN
ITERATIONS = 8  # of the multipliers, at most
FLIPS = 8  # single entries flipped at most, a vector


@intrinsic
def _power_of_two(_context: Any, x: Any) -> Any:
    """The largest power of two not above |x| (0 for subnormal x), by masking the exponent."""
    width, mask = {types.float32: (32, 0x7F800000), types.float64: (64, 0x7FF0000000000000)}[x]

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        whole = ir.IntType(width)
        masked = builder.and_(builder.bitcast(arguments[0], whole), ir.Constant(whole, mask))
        return builder.bitcast(masked, arguments[0].type)

    return x(x), generate


@intrinsic
def _value(_context: Any, x: Any) -> Any:
    """A stored number as a float: the bits of a bfloat16 widened, floats as they are."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if x != types.uint16:
            return arguments[0]
        whole = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(whole, ir.FloatType())

    return (types.float32 if x == types.uint16 else x)(x), generate


@intrinsic
def _stored(_context: Any, x: Any, like: Any) -> Any:
    """The inverse of `_value`, to the type of `like`, for a float that is on the grid."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if like != types.uint16:
            return arguments[0]
        whole = builder.lshr(builder.bitcast(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.trunc(whole, ir.IntType(16))

    return like(x, like), generate


@njit(nogil=True, cache=True, inline="always")
def _rounded(x: Any, lowest: Any, unit: Any, magic: Any, largest: Any) -> Any:
    """`x` to the nearest value of the grid, ties to even: adding and taking away 1.5 x 2^23 units drops the rest."""
    step = max(_power_of_two(x), lowest) * unit * magic
    return min(max((x + step) - step, -largest), largest)


@njit(nogil=True, cache=True)
def _add_combination(row: Any, weights: Any, vectors: Any, sign: Any) -> None:
    """`row` [n] += sign * `weights` [k] `vectors` [k, n]."""
    n = row.shape[0]
    k = weights.shape[0]
    a = 0
    while a + 4 <= k:
        w0, w1, w2, w3 = sign * weights[a], sign * weights[a + 1], sign * weights[a + 2], sign * weights[a + 3]
        for j in range(n):
            row[j] += (w0 * vectors[a, j] + w1 * vectors[a + 1, j]) + (w2 * vectors[a + 2, j] + w3 * vectors[a + 3, j])
        a += 4
    while a < k:
        w0 = sign * weights[a]
        for j in range(n):
            row[j] += w0 * vectors[a, j]
        a += 1


@njit(nogil=True, cache=True)
def _add_components(partial: Any, v: Any, first: Any, rows: Any, count: Any) -> None:
    """`partial` [k, n] += `v` [first : first + count]^T `rows` [: count]; count is at most 4."""
    n = rows.shape[1]
    for a in range(v.shape[1]):
        if count == 4:
            w0, w1, w2, w3 = v[first, a], v[first + 1, a], v[first + 2, a], v[first + 3, a]
            for j in range(n):
                partial[a, j] += (w0 * rows[0, j] + w1 * rows[1, j]) + (w2 * rows[2, j] + w3 * rows[3, j])
        else:
            for b in range(count):
                w0 = v[first + b, a]
                for j in range(n):
                    partial[a, j] += w0 * rows[b, j]


@njit(nogil=True, cache=True)
def _add_squares(row: Any, squares: Any) -> None:
    """`squares` [n] += `row` [n] squared."""
    for j in range(row.shape[0]):
        squares[j] += row[j] * row[j]


@njit(nogil=True, cache=True)
def _carry(partial: Any, total: Any) -> None:
    """Move the sums in `partial` into the float64 `total`."""
    for a in range(partial.shape[0]):
        for j in range(partial.shape[1]):
            total[a, j] += partial[a, j]
            partial[a, j] = 0


@njit(nogil=True, cache=True)
def _read_strip(stored: Any, start: Any, by_rows: bool, first: Any, strip: Any) -> None:
    """`strip` [m, n] becomes the numbers at `first` and after of the vectors from `start`."""
    m, n = strip.shape
    if by_rows:
        for j in range(n):
            line = stored[start + j, first : first + m]
            for i in range(m):
                strip[i, j] = _value(line[i])
    else:
        for i in range(m):
            line, row = stored[first + i, start : start + n], strip[i]
            for j in range(n):
                row[j] = _value(line[j])


@njit(nogil=True, cache=True)
def _write_strip(strip: Any, start: Any, by_rows: bool, first: Any, stored: Any) -> None:
    """The inverse of `_read_strip`."""
    m, n = strip.shape
    like = stored[0, 0]
    if by_rows:
        for j in range(n):
            line = stored[start + j, first : first + m]
            for i in range(m):
                line[i] = _stored(strip[i, j], like)
    else:
        for i in range(m):
            line, row = stored[first + i, start : start + n], strip[i]
            for j in range(n):
                line[j] = _stored(row[j], like)


@njit(nogil=True, cache=True)
def _load(stored: Any, start: Any, by_rows: bool, v: Any, scales: Any, every: Any, x: Any, before: Any) -> Any:
    """Read the tile `x` [d, n] of `stored` from vector `start` on; its components go to `before` [k, n].

    Returns the square of every vector's norm, [n].
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
            _add_squares(row, square[0])
        for i in range(first, last, STEP):
            count = min(STEP, last - i)
            _add_components(partial, v, i, x[i : i + count], count)
        _carry(partial, before)
        _carry(square, squares)
    return squares[0]


@njit(nogil=True, cache=True)
def _apply(y: Any, u: Any, s: Any, before: Any) -> None:
    """`y` becomes `y - u before + s`."""
    d, n = y.shape
    minus = y.dtype.type(-1)
    for i in range(d):
        _add_combination(y[i], u[i], before, minus)
        if s[i] != 0:
            for j in range(n):
                y[i, j] += s[i]


@njit(nogil=True, cache=True)
def _round_row(row: Any, scales: Any, group: Any, grid: Any) -> None:
    """`row` [n] to the grid, times the scale of each entry where there are scales."""
    lowest, unit, magic, largest = grid
    if scales is None:
        for j in range(row.shape[0]):
            row[j] = _rounded(row[j], lowest, unit, magic, largest)
    else:
        scale = scales[group]
        for j in range(row.shape[0]):
            row[j] = _rounded(row[j] / scale[j], lowest, unit, magic, largest) * scale[j]


@njit(nogil=True, cache=True)
def _errors(y: Any, v: Any, multiplier: Any, scales: Any, every: Any, grid: Any, e: Any) -> None:
    """`e` [k, n] becomes `v^T (round(y + v m) - y)`."""
    d, n = y.shape
    one = y.dtype.type(1)
    rows, partial = np.empty((STEP, n), y.dtype), np.zeros(e.shape, y.dtype)
    e[:] = 0.0
    for first in range(0, d, RUN):
        last = min(first + RUN, d)
        for start in range(first, last, STEP):
            count = min(STEP, last - start)
            for b in range(count):
                i = start + b
                row, exact = rows[b], y[i]
                row[:] = exact
                _add_combination(row, v[i], multiplier, one)
                _round_row(row, scales, i // every, grid)
                for j in range(n):
                    row[j] -= exact[j]
            _add_components(partial, v, start, rows, count)
        _carry(partial, e)


@njit(nogil=True, cache=True)
def _errors_of_one(y: Any, v: Any, multiplier: Any, grid: Any, e: Any) -> None:
    """`_errors` for one direction and no scales, which most edits are, in one loop."""
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
                r0 = _rounded(y0[j] + w0 * m[j], lowest, unit, magic, largest) - y0[j]
                r1 = _rounded(y1[j] + w1 * m[j], lowest, unit, magic, largest) - y1[j]
                r2 = _rounded(y2[j] + w2 * m[j], lowest, unit, magic, largest) - y2[j]
                r3 = _rounded(y3[j] + w3 * m[j], lowest, unit, magic, largest) - y3[j]
                total[j] += (w0 * r0 + w1 * r1) + (w2 * r2 + w3 * r3)
            i += STEP
        while i < last:
            w0, y0 = v[i, 0], y[i]
            for j in range(n):
                total[j] += w0 * (_rounded(y0[j] + w0 * m[j], lowest, unit, magic, largest) - y0[j])
            i += 1
        _carry(partial, e)


@njit(nogil=True, cache=True)
def _gathered(x: Any, columns: Any) -> Any:
    """The `columns` of `x`, side by side; None of None."""
    if x is None:
        return None
    result = np.empty((x.shape[0], len(columns)), x.dtype)
    for i in range(x.shape[0]):
        for j in range(len(columns)):
            result[i, j] = x[i, columns[j]]
    return result


@njit(nogil=True, cache=True)
def _multipliers(y: Any, v: Any, inverse: Any, tolerance: Any, scales: Any, every: Any, grid: Any, e: Any) -> Any:
    """The multipliers [k, n] that leave the smallest error, which `e` [k, n] becomes.

    `inverse` is `(V^T V)^-1`; a vector is done when its error is below its `tolerance` [n], or when
    shorter steps no longer help. The others go on without it.
    """
    k, n = e.shape
    best, least, length = np.zeros((k, n), y.dtype), np.full(n, np.inf), np.ones(n)
    here = np.arange(n)
    trial = np.zeros((k, n), y.dtype)
    for _ in range(ITERATIONS):
        error = np.empty((k, len(here)))
        if scales is None and k == 1:
            _errors_of_one(y, v, trial, grid, error)
        else:
            _errors(y, v, trial, scales, every, grid, error)
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
            y, trial, here = _gathered(y, left), _gathered(trial, left), here[left]
            scales = _gathered(scales, left)
    return best


@njit(nogil=True, cache=True, inline="always")
def _other_way(q: Any, y: Any, lowest: Any, unit: Any) -> Any:
    """The step from `q` to its neighbour on the other side of `y`."""
    step = max(_power_of_two(q), lowest) * unit
    return -step if q > y else step


@njit(nogil=True, cache=True)
def _steps(q: Any, y: Any, scales: Any, group: Any, grid: Any, step: Any) -> None:
    """The step [n] of every entry of a row to its other neighbour; 0 where that is beyond the largest value."""
    lowest, unit, _, largest = grid
    if scales is None:
        for j in range(q.shape[0]):
            step[j] = _other_way(q[j], y[j], lowest, unit)
            step[j] = step[j] if abs(q[j] + step[j]) <= largest else 0
    else:
        scale = scales[group]
        for j in range(q.shape[0]):
            step[j] = _other_way(q[j] / scale[j], y[j] / scale[j], lowest, unit) * scale[j]
            step[j] = step[j] if abs(q[j] + step[j]) <= largest * scale[j] else 0


@njit(nogil=True, cache=True)
def _flip_all(
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
        _add_combination(row, v[i], multiplier, one)
        _round_row(row, scales, i // every, grid)
        if not going:
            continue
        square = y.dtype.type(0)
        for a in range(k):
            square += v[i, a] * v[i, a]
        gain[:] = 0
        _add_combination(gain, v[i], narrow, one)
        _steps(row, exact, scales, i // every, grid, step)
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
            _steps(q[i], y[i], scales, group, grid, step)
            q[i, j] += step[j]
            for a in range(k):
                e[a, j] += v[i, a] * step[j]


@njit(nogil=True, cache=True)
def _flip_rest(y: Any, v: Any, tolerance: Any, scales: Any, every: Any, grid: Any, q: Any, e: Any) -> None:
    """Flip further entries, one at a time, of the few vectors that are not within their tolerance yet."""
    lowest, unit, _, largest = grid
    d, n = y.shape
    k = v.shape[1]
    one = y.dtype.type(1)
    for j in range(n):
        for _ in range(FLIPS):
            size = (e[:, j] ** 2).sum()
            if np.sqrt(size) <= tolerance[j]:
                break
            where, move, least = -1, y.dtype.type(0), 0.0
            for i in range(d):
                width = one if scales is None else scales[i // every, j]
                step = _other_way(q[i, j] / width, y[i, j] / width, lowest, unit) * width
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


@njit(nogil=True, cache=True)
def _finish(y: Any, q: Any, rounds: bool, v: Any, scales: Any, every: Any, grid: Any, e: Any, beyond: Any) -> Any:
    """`y` becomes `q`, or its own rounding where `q` is None; `e` its error `v^T (q - y)`.

    `beyond` [n] becomes by how much the largest entry of a vector exceeds what its scale can hold. Returns
    the sum of `(q - y)^2`.
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
                        _round_row(row, scales, i // every, grid)
                if scales is None:
                    for j in range(n):
                        beyond[j] = max(beyond[j], abs(old[j]) - largest)
                else:
                    scale = scales[i // every]
                    for j in range(n):
                        beyond[j] = max(beyond[j], abs(old[j]) / scale[j] - largest)
                for j in range(n):
                    new = row[j]
                    row[j] = new - old[j]
                    old[j] = new
                    square[0, j] += row[j] * row[j]
            _add_components(partial, v, start, rows, count)
        _carry(partial, e)
        _carry(square, squares)
    return squares.sum()


@njit(nogil=True, cache=True)
def _save(q: Any, start: Any, by_rows: bool, before: Any, scales: Any, every: Any, grid: Any, stored: Any) -> Any:
    """Write the tile `q` [d, n] into `stored` from vector `start` on; returns the sum of the squared changes.

    What is stored there has the scales `before`.
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
            row, difference = q[first + i], old[i]
            if scales is None:
                for j in range(n):
                    difference[j] -= row[j]
            else:
                scale, former = scales[(first + i) // every], before[(first + i) // every]
                for j in range(n):
                    difference[j] = difference[j] * former[j] - row[j]
                    row[j] = _rounded(row[j] / scale[j], lowest, unit, magic, largest)
            _add_squares(difference, square[0])
        _carry(square, squares)
        _write_strip(q[first:last], start, by_rows, first, stored)
    return squares.sum()


@njit(nogil=True, cache=True)
def _tile(scales: Any, start: Any, n: Any, every: Any) -> Any:
    """The scales of the `n` vectors from `start` on, a column each; None of None."""
    if scales is None:
        return None
    result = np.empty((scales.shape[0], n), scales.dtype)
    for i in range(scales.shape[0]):
        for j in range(n):
            result[i, j] = scales[i, (start + j) // every]
    return result


@njit(nogil=True, cache=True)
def edit_tiles(
    stored: Any, by_rows: bool, first: Any, last: Any, u: Any, v: Any, inverse: Any, s: Any,
    scales: Any, rescaled: Any, every: Any, grid: Any, rounds: bool, cancel: bool, enough: Any, sums: Any, before: Any,
) -> None:  # fmt: skip
    """Edit and round the vectors `first` to `last` of `stored` in place; add to `sums` what was measured.

    Stored numbers have the `scales` before and are `rescaled` afterwards. The components that the vectors
    had go to `before` [k, last - first].
    """
    d, k = v.shape
    length = np.sqrt(np.sum(v * v))
    room = grid[3] * grid[1] / 4  # what exceeds the largest value by half a unit is rounded to it
    x, q = np.empty((d, VECTORS), u.dtype), np.empty((d if cancel else 0, VECTORS), u.dtype)
    for start in range(first, last, VECTORS):
        n = min(VECTORS, last - start)
        if n < VECTORS:
            x, q = np.empty((d, n), u.dtype), np.empty((d if cancel else 0, n), u.dtype)
        tile, former = _tile(rescaled, start, n, every[1]), _tile(scales, start, n, every[1])
        seen, e, beyond = np.zeros((k, n)), np.zeros((k, n)), np.zeros(n, u.dtype)
        squares = _load(stored, start, by_rows, v, former, every[0], x, seen)
        before[:, start - first : start - first + n] = seen
        _apply(x, u, s, seen.astype(u.dtype))
        if cancel:
            tolerance = enough * np.sqrt(k * squares / d)  # of a vector's typical component
            # A flip finishes what is within its reach: some times the typical step of a component.
            reach = np.maximum(tolerance, 4 * grid[1] * length * np.sqrt(squares) / d) if k == 1 else tolerance
            multiplier = _multipliers(x, v, inverse, reach, tile, every[0], grid, e)
            _flip_all(x, v, multiplier, tolerance, tile, every[0], grid, q, e)
            _flip_rest(x, v, tolerance, tile, every[0], grid, q, e)
            sums[2] += _finish(x, q, rounds, v, tile, every[0], grid, e, beyond)
        else:
            sums[2] += _finish(x, None, rounds, v, tile, every[0], grid, e, beyond)
        sums[0] += squares.sum()
        sums[1] += _save(x, start, by_rows, former, tile, every[0], grid, stored)
        sums[4] += (e * e).sum()
        sums[5] += (beyond > room).sum()
