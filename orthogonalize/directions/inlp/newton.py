"""The Newton iteration of `logistic`, compiled: one problem after the other from their Gram matrices, on a CPU.

The interpreter is not held meanwhile, so parts of a batch can be given to a thread each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg  # noqa: F401 (numba's cholesky is SciPy's; here, so that a limit on BLAS threads finds it loaded)
from numba import njit

STEPS = 100  # at most
HALVINGS = 40  # of a step, at most
LEAST_CURVATURE = 1e-10
RISE = 1e-12  # of the objective, which rounding alone may cause
# Sums may be taken in any order: else no loop that sums is vectorised.
FREE = {"contract", "reassoc", "nsz"}


@njit(nogil=True, cache=True, fastmath=FREE)
def _multiply(matrix: Any, x: Any, out: Any) -> None:
    """`out` = `matrix` x, for a symmetric matrix [n, n]."""
    for i in range(len(x)):
        row = matrix[i]
        total = 0.0
        for j in range(len(x)):
            total += row[j] * x[j]
        out[i] = total


@njit(nogil=True, cache=True, fastmath=FREE)
def _solve(lower: Any, x: Any, y: Any) -> None:
    """Solve `L L^T z = x`, and with y for x, in place, for a lower triangular L [n, n] stored by columns."""
    columns, n = lower.T, len(x)
    for k in range(n):
        column = columns[k]
        of_x, of_y = x[k] / column[k], y[k] / column[k]
        x[k], y[k] = of_x, of_y
        for i in range(k + 1, n):
            x[i] -= of_x * column[i]
            y[i] -= of_y * column[i]
    for k in range(n - 1, -1, -1):
        column = columns[k]
        of_x, of_y = 0.0, 0.0
        for i in range(k + 1, n):
            of_x += column[i] * x[i]
            of_y += column[i] * y[i]
        x[k], y[k] = (x[k] - of_x) / column[k], (y[k] - of_y) / column[k]


@njit(nogil=True, cache=True, fastmath=FREE)
def _drop(idle: Any, x: Any) -> None:
    """Take the part of `x` [n] along the orthonormal columns of `idle` [n, k] away."""
    parts = np.zeros(idle.shape[1])
    for i in range(len(x)):
        for j in range(len(parts)):
            parts[j] += idle[i, j] * x[i]
    for i in range(len(x)):
        for j in range(len(parts)):
            x[i] -= idle[i, j] * parts[j]


@njit(nogil=True, cache=True)
def _objective(a: Any, b: float, margins: Any, labels: Any, c: float) -> float:
    total = 0.0
    for i in range(len(a)):
        z = margins[i] if labels[i] == 0 else -margins[i]
        total += a[i] * (margins[i] - b) / 2 + c * (max(z, 0.0) + np.log1p(np.exp(-abs(z))))
    return total


@njit(nogil=True, cache=True)
def _step(gram: Any, idle: Any, labels: Any, c: float, margins: Any, a: Any, m: Any) -> float:
    """From `margins` to the next weights `a`, margins `m` and the intercept, as reweighted least squares."""
    n = len(labels)
    scale, target, ones = np.empty(n), np.empty(n), np.empty(n)
    for i in range(n):
        p = 1 / (1 + np.exp(-margins[i]))
        curvature = max(p * (1 - p), LEAST_CURVATURE)
        scale[i] = np.sqrt(c * curvature)
        target[i] = scale[i] * (margins[i] + (labels[i] - p) / curvature)
        ones[i] = scale[i]
    matrix = np.zeros((n, n))  # its lower triangle is all that is read
    for i in range(n):
        for j in range(i + 1):
            matrix[i, j] = gram[i, j] * (scale[i] * scale[j])
        matrix[i, i] += 1
    lower = np.linalg.cholesky(matrix)
    _solve(lower, target, ones)
    above, below = 0.0, 0.0
    for i in range(n):
        above += scale[i] * target[i]
        below += scale[i] * ones[i]
    b: float = above / below
    for i in range(n):
        a[i] = scale[i] * (target[i] - b * ones[i])
    _drop(idle, a)
    _multiply(gram, a, m)
    for i in range(n):
        m[i] += b
    return b


@njit(nogil=True, cache=True)
def _fit(gram: Any, idle: Any, noise: float, labels: Any, c: float, tolerance: float, a: Any, m: Any) -> float:
    """Fit one problem, from the weights `a` and margins `m`, which become the solution's; its intercept."""
    n = len(labels)
    b = 0.0
    next_a, next_m = np.empty(n), np.empty(n)
    for _ in range(STEPS):
        next_b = _step(gram, idle, labels, c, m, next_a, next_m)
        before = _objective(a, b, m, labels, c)
        for _ in range(HALVINGS):
            if _objective(next_a, next_b, next_m, labels, c) <= before + RISE * abs(before):
                break
            for i in range(n):
                next_a[i] = (a[i] + next_a[i]) / 2
                next_m[i] = (m[i] + next_m[i]) / 2
            next_b = (b + next_b) / 2
        spread, moved = 0.0, 0.0
        for i in range(n):
            spread = max(spread, abs(next_m[i] - next_b))
            moved = max(moved, abs(next_m[i] - m[i]))
            a[i], m[i] = next_a[i], next_m[i]
        b = next_b
        if not moved > tolerance * spread + noise * c:
            break
    return b


@njit(nogil=True, cache=True)
def fit_by_newton(
    grams: Any,
    idle: Any,
    noise: Any,
    labels: Any,
    c: float,
    tolerance: float,
    duals: Any,
    intercepts: Any,
    margins: Any,
) -> None:
    """Fit the problems of `grams` [pairs, n, n] to `labels` [n] of 0 and 1, all in float64.

    Args:
        idle: [pairs, n, k], orthonormal; the weights' part along it is dropped.
        noise: [pairs], what rounding can put into the margins where no weight is over 1.
        tolerance: of the margins' spread, the most that the last step may move one.
        duals, margins: [pairs, n] and `intercepts` [pairs], to be filled.
    """
    for pair in range(len(grams)):
        duals[pair], margins[pair] = 0, 0
        intercepts[pair] = _fit(grams[pair], idle[pair], noise[pair], labels, c, tolerance, duals[pair], margins[pair])
