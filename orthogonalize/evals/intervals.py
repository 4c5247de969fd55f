"""Confidence intervals and paired tests. SciPy imports its statistics on first use, which takes most of a second."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy

RESAMPLES = 2000
FEWEST = 5  # items; with fewer, a bootstrap interval misses its level by far
RESOLVED = 1e-6  # nats
BATCH = 100  # resamples in memory at a time: with 14,000 items, all of them would take 2 GB
Z = 1.959963984540054  # the normal quantile of a two-sided 95% interval


def proportion_interval(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval for `count` out of `n`."""
    interval = scipy.stats.binomtest(count, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _changed(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """The number of outcomes lost, and the number gained."""
    pairs = list(zip(before, after, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided McNemar p-value of paired yes/no outcomes; 1 if none changed."""
    lost, gained = _changed(before, after)
    return float(scipy.stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def share_difference_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """Tango's 95% score interval for the difference of two paired shares (Statistics in Medicine 17, 1998).

    Unlike a bootstrap, it keeps its level when few items changed, or all did.
    """
    n = len(before)
    lost, gained = _changed(before, after)

    def statistic(difference: float) -> float:
        """The score statistic at a true `difference`; `share` is the likeliest share lost there (equation 8)."""
        half = gained + lost - (2 * n - gained + lost) * difference
        product = 8 * n * lost * difference * (1 - difference)
        share = (math.sqrt(max(half * half + product, 0.0)) + half) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        distance = gained - lost - n * difference
        return distance / math.sqrt(variance) if distance else 0.0

    observed = (gained - lost) / n

    def end(side: float, z: float) -> float:
        if observed == side:
            return side
        limit = side * (1 - 1e-9)  # at 1 itself the variance is zero
        return float(scipy.optimize.brentq(lambda difference: statistic(difference) - z, limit, observed))

    return end(-1.0, Z), end(1.0, -Z)


def _interval(columns: tuple[Sequence[float], ...], statistic: object, seed: int = 0) -> tuple[float, float] | None:
    """Hesterberg's (2015) "expanded percentile" bootstrap interval, which corrects for small samples.

    None below `FEWEST` items: resamples never leave the observed range, so with two items half the intervals would
    miss.
    """
    n = len(columns[0])
    if n < FEWEST:
        return None
    tail = float(scipy.stats.norm.cdf(math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.025, n - 1)))
    result = scipy.stats.bootstrap(
        tuple(np.asarray(c, dtype=float) for c in columns),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        method="percentile",
        confidence_level=1 - 2 * tail,
        rng=np.random.default_rng(seed),
    )
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _per_token(losses: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(losses.sum(axis=axis) / tokens.sum(axis=axis))


def increase(base: np.ndarray, edited: np.ndarray, axis: int = -1) -> np.ndarray:
    """The relative increase of a summed loss along `axis`; `RESOLVED` is the least base loss that float32 resolves."""
    return np.asarray(edited.sum(axis=axis) / np.maximum(base.sum(axis=axis), RESOLVED) - 1)


def _difference(base: np.ndarray, edited: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray((edited - base).mean(axis=axis))


def loss_interval(losses: Sequence[float], tokens: Sequence[int]) -> tuple[float, float] | None:
    """95% bootstrap interval, over texts, for the loss (or any other sum over tokens) per token."""
    return _interval((losses, [float(t) for t in tokens]), _per_token)


def increase_interval(base: Sequence[float], edited: Sequence[float]) -> tuple[float, float] | None:
    """95% bootstrap interval, over texts, for the relative increase of the summed loss."""
    return _interval((base, edited), increase)


def difference_interval(base: Sequence[float], edited: Sequence[float]) -> tuple[float, float] | None:
    """95% bootstrap interval, over items, for the mean difference of paired values."""
    return _interval((base, edited), _difference)


def paired_permutation(base: Sequence[float], edited: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of a paired permutation test of the mean difference.

    Exact for up to ten pairs; otherwise from `RESAMPLES` random permutations, so at least 2 / (RESAMPLES + 1).
    """
    differences = np.asarray(edited, dtype=float) - np.asarray(base, dtype=float)
    if not differences.any() or len(differences) < 2:  # with one pair, both permutations are equally extreme
        return 1.0
    mean: Callable[..., np.ndarray] = lambda x, axis: np.asarray(x.mean(axis=axis))  # noqa: E731
    result = scipy.stats.permutation_test(
        (differences,),
        mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES if len(differences) > 10 else np.inf,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
