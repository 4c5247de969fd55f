"""Confidence intervals and paired tests, in pairs that cannot contradict each other.

Shares have Tango's score interval and McNemar's score test; other means and relative increases have one bootstrap
distribution for both. In either pair the 95% interval leaves out zero exactly where p is below 0.05. SciPy imports its
statistics on first use, which takes most of a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy

RESAMPLES = 2000
FEWEST = 5  # items; with fewer, a bootstrap interval misses its level by far
FEWEST_PAIRS = 6  # with fewer, no distribution-free test can reject at 5%, however the pairs differ
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
    """Two-sided p-value of McNemar's score test (1947, no continuity correction); 1 if nothing changed.

    `share_difference_interval` inverts this test. The exact binomial test is more conservative, so that its p can be
    above 0.05 where the interval leaves out zero.
    """
    lost, gained = _changed(before, after)
    return float(2 * scipy.stats.norm.sf(abs(gained - lost) / math.sqrt(lost + gained))) if lost + gained else 1.0


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


class Comparison(NamedTuple):
    """A 95% interval, None below `FEWEST_PAIRS`, and the p-value of the test that goes with it."""

    ci95: tuple[float, float] | None
    p: float


def _resampled(columns: tuple[Sequence[float], ...], statistic: object, seed: int) -> np.ndarray:
    """`RESAMPLES` values of `statistic` on resampled items, sorted."""
    result = scipy.stats.bootstrap(
        tuple(np.asarray(c, dtype=float) for c in columns),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return np.sort(np.asarray(result.bootstrap_distribution, dtype=float))


def _interval(columns: tuple[Sequence[float], ...], statistic: object, seed: int = 0) -> tuple[float, float] | None:
    """Hesterberg's (2015) "expanded percentile" bootstrap interval, which corrects for small samples.

    None below `FEWEST` items: resamples never leave the observed range, so with two items half the intervals would
    miss.
    """
    n = len(columns[0])
    return None if n < FEWEST else _expanded_percentiles(_resampled(columns, statistic, seed), n)


def _expanded_percentiles(values: np.ndarray, n: int) -> tuple[float, float] | None:
    tail = float(scipy.stats.norm.cdf(math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.025, n - 1)))
    low, high = (float(end) for end in np.quantile(values, [tail, 1 - tail]))
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _expanded_p(values: np.ndarray, n: int) -> float:
    """Two-sided p-value of zero: 1 minus the level at which the expanded percentile interval begins to hold it."""
    nearest = max(min(_level(values), _level(-values[::-1])), 1 / (len(values) + 1))
    return min(1.0, 2 * float(scipy.stats.t.cdf(scipy.stats.norm.ppf(nearest) / math.sqrt(n / (n - 1)), n - 1)))


def _level(values: np.ndarray) -> float:
    """The largest level whose quantile of the sorted `values` is at most zero."""
    last = int(np.searchsorted(values, 0.0, side="right")) - 1
    if last < 0 or last == len(values) - 1:
        return 0.0 if last < 0 else 1.0
    return float(last - values[last] / (values[last + 1] - values[last])) / (len(values) - 1)


def _compared(base: Sequence[float], edited: Sequence[float], statistic: object, seed: int = 0) -> Comparison:
    """Interval and p-value from one bootstrap distribution; below `FEWEST_PAIRS`, only a permutation test's p-value."""
    n = len(base)
    if n >= FEWEST_PAIRS:
        values = _resampled((base, edited), statistic, seed)
        ci95 = _expanded_percentiles(values, n)
        if ci95 is not None:
            return Comparison(ci95, _expanded_p(values, n))
    return Comparison(None, paired_permutation(base, edited))


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


def compared_increase(base: Sequence[float], edited: Sequence[float]) -> Comparison:
    """The relative increase of the summed loss, bootstrapped over texts."""
    return _compared(base, edited, increase)


def compared_means(base: Sequence[float], edited: Sequence[float]) -> Comparison:
    """The mean difference of paired values, bootstrapped over items."""
    return _compared(base, edited, _difference)


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
