"""The compiled Newton iteration of `logistic`: one problem after another, from their Gram matrices, on a CPU.

It releases the interpreter lock, so that threads can share a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.linalg  # noqa: F401 (numba uses its cholesky; loaded here, before the number of BLAS threads is limited)

from ...core.compiled import compiled

Array = np.ndarray[Any, Any]

STEPS = 100  # maximum number of Newton steps
HALVINGS = 40  # maximum number of halvings of a step
LEAST_CURVATURE = 1e-10
RISE = 1e-12  # relative rise of the objective that rounding alone can cause
# Let sums be reordered; otherwise the loops would not be vectorised.
FREE = {"contract", "reassoc", "nsz"}


@compiled(nogil=True, fastmath=FREE)
def _multiply(matrix: Any, x: Any, out: Any) -> None:
    """`out` = `matrix` x, for a symmetric matrix [n, n]."""
    for i in range(len(x)):
        row = matrix[i]
        total = 0.0
        for j in range(len(x)):
            total += row[j] * x[j]
        out[i] = total


@compiled(nogil=True, fastmath=FREE)
def _solve(lower: Any, x: Any, y: Any) -> None:
    """Solve `L L^T z = x`, and the same for y, in place, for a lower triangular L [n, n] stored by columns."""
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


@compiled(nogil=True, fastmath=FREE)
def _drop(idle: Any, x: Any) -> None:
    """Remove the part of `x` [n] along the orthonormal columns of `idle` [n, k]."""
    parts = np.zeros(idle.shape[1])
    for i in range(len(x)):
        for j in range(len(parts)):
            parts[j] += idle[i, j] * x[i]
    for i in range(len(x)):
        for j in range(len(parts)):
            x[i] -= idle[i, j] * parts[j]


@compiled(nogil=True)
def _objective(a: Any, b: float, margins: Any, labels: Any, c: float) -> float:
    total = 0.0
    for i in range(len(a)):
        z = margins[i] if labels[i] == 0 else -margins[i]
        total += a[i] * (margins[i] - b) / 2 + c * (max(z, 0.0) + np.log1p(np.exp(-abs(z))))
    return total


@compiled(nogil=True)
def _step(gram: Any, idle: Any, labels: Any, c: float, margins: Any, a: Any, m: Any) -> float:
    """One step of reweighted least squares from `margins`: fills weights `a` and margins `m`, returns the intercept."""
    n = len(labels)
    scale, target, ones = np.empty(n), np.empty(n), np.empty(n)
    for i in range(n):
        p = 1 / (1 + np.exp(-margins[i]))
        curvature = max(p * (1 - p), LEAST_CURVATURE)
        scale[i] = np.sqrt(c * curvature)
        target[i] = scale[i] * (margins[i] + (labels[i] - p) / curvature)
        ones[i] = scale[i]
    matrix = np.zeros((n, n))  # only its lower triangle is read
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


@compiled(nogil=True)
def _fit(gram: Any, idle: Any, noise: float, labels: Any, c: float, tolerance: float, a: Any, m: Any) -> float:
    """Fit one problem, starting from the weights `a` and margins `m`, which it updates; returns the intercept."""
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


@compiled(nogil=True)
def _fit_all(
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
    for pair in range(len(grams)):
        duals[pair], margins[pair] = 0, 0
        intercepts[pair] = _fit(grams[pair], idle[pair], noise[pair], labels, c, tolerance, duals[pair], margins[pair])


def _check(given: Mapping[str, Array], filled: Mapping[str, Array]) -> None:
    """Check what the loops assume of their arguments.

    Raises:
        ValueError: an array has another shape, format or memory layout, or one that is filled shares memory.
    """
    grams = given["grams"]
    pairs, n = grams.shape[0], grams.shape[-1]
    shapes = {
        "grams": (pairs, n, n), "idle": (pairs, n, given["idle"].shape[-1]), "noise": (pairs,), "labels": (n,),
        "duals": (pairs, n), "intercepts": (pairs,), "margins": (pairs, n),
    }  # fmt: skip
    for name, array in {**given, **filled}.items():
        if array.shape != shapes[name] or array.dtype != np.float64:
            raise ValueError(f"{name} {array.dtype}{list(array.shape)} must be float64{list(shapes[name])}")
    for name, array in filled.items():
        others = (other for each, other in {**given, **filled}.items() if each != name)
        if not array.flags.behaved or any(np.may_share_memory(array, other) for other in others):
            raise ValueError(f"{name} must be aligned and writable, in memory of its own")


def fit_by_newton(
    grams: Array, idle: Array, noise: Array, labels: Array, c: float, tolerance: float,
    duals: Array, intercepts: Array, margins: Array,
) -> None:  # fmt: skip
    """Fit the problems of `grams` [pairs, n, n] to `labels` [n] of 0 and 1, all in float64.

    Args:
        idle: [pairs, n, k], orthonormal; the part of the weights along it is removed.
        noise: [pairs], bound on the rounding error of the margins for weights up to 1.
        tolerance: the fit ends when no margin moves by more than this share of their spread.
        duals, intercepts, margins: [pairs, n], [pairs] and [pairs, n], to be filled.

    Raises:
        ValueError: an array has another shape, format or memory layout than the compiled loops assume.
    """
    _check(
        {"grams": grams, "idle": idle, "noise": noise, "labels": labels},
        {"duals": duals, "intercepts": intercepts, "margins": margins},
    )
    _fit_all(grams, idle, noise, labels, c, tolerance, duals, intercepts, margins)
