"""Intervals and paired tests; SciPy loads its statistics when one is asked for, which takes most of a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy

RESAMPLES = 2000


def proportion_interval(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of `count` out of `n`."""
    interval = scipy.stats.binomtest(count, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided McNemar p-value of paired yes/no outcomes; 1 where none changed."""
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    return float(scipy.stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def _interval(columns: tuple[Sequence[float], ...], statistic: object, seed: int = 0) -> tuple[float, float] | None:
    if len(columns[0]) < 2:
        return None  # one item says nothing about others
    result = scipy.stats.bootstrap(
        tuple(np.asarray(c, dtype=float) for c in columns),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _per_token(losses: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(losses.sum(axis=axis) / tokens.sum(axis=axis))


def _increase(base: np.ndarray, edited: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(edited.sum(axis=axis) / base.sum(axis=axis) - 1)


def _difference(base: np.ndarray, edited: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray((edited - base).mean(axis=axis))


def loss_interval(losses: Sequence[float], tokens: Sequence[int]) -> tuple[float, float] | None:
    """95% bootstrap interval, over texts, of the loss (or any other sum over tokens) a token."""
    return _interval((losses, [float(t) for t in tokens]), _per_token)


def increase_interval(base: Sequence[float], edited: Sequence[float]) -> tuple[float, float] | None:
    """95% bootstrap interval, over texts, of the relative increase of the summed loss."""
    return _interval((base, edited), _increase)


def difference_interval(base: Sequence[float], edited: Sequence[float]) -> tuple[float, float] | None:
    """95% bootstrap interval, over items, of the mean difference of paired values."""
    return _interval((base, edited), _difference)


def paired_permutation(base: Sequence[float], edited: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of the mean difference of paired values, by swapping within pairs.

    Exact for up to ten pairs, else from `RESAMPLES` random swaps, so never below 1 / (RESAMPLES + 1).
    """
    differences = np.asarray(edited, dtype=float) - np.asarray(base, dtype=float)
    if not differences.any():
        return 1.0
    mean: Callable[..., np.ndarray] = lambda x, axis: np.asarray(x.mean(axis=axis))  # noqa: E731
    result = scipy.stats.permutation_test(
        (differences,),
        mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES if len(differences) > 10 else np.inf,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
