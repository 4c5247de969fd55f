"""Means of a side's activations: arithmetic, and two that a few outlying prompts hardly move.

A few tokens of some models have activations many times as large as all others ("massive activations"; Sun et al. 2024),
and one of them among the prompts can turn the difference of arithmetic means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import torch

from ..core.errors import OrthogonalizeError

ARITHMETIC, WINSORIZED, GEOMETRIC_MEDIAN = "arithmetic", "winsorized", "geometric-median"
QUANTILE = 0.995  # of `winsorized`, unless it names another
CONVERGED = 1e-12  # the last step, relative to the typical distance from the median
STEPS = 10_000

Mean = Callable[[torch.Tensor], torch.Tensor]


def find_mean(text: str) -> Mean:
    """The mean called `arithmetic`, `winsorized`, `winsorized:QUANTILE` or `geometric-median`.

    It takes samples [n, ..., d] and returns their mean [..., d] in float64.

    Raises:
        OrthogonalizeError: there is no such mean.
    """
    if text == ARITHMETIC:
        return arithmetic_mean
    if text == GEOMETRIC_MEDIAN:
        return geometric_median
    found = re.fullmatch(rf"{WINSORIZED}(?::(0?\.\d+))?", text)
    quantile = float(found[1] or QUANTILE) if found else 0.0
    if not 0.5 < quantile < 1:
        raise OrthogonalizeError(
            f"--mean {text}: give {ARITHMETIC}, {WINSORIZED} (at {QUANTILE}; {WINSORIZED}:0.95 for another quantile, "
            f"between 0.5 and 1) or {GEOMETRIC_MEDIAN}"
        )
    return partial(winsorized_mean, quantile=quantile)


def arithmetic_mean(samples: torch.Tensor) -> torch.Tensor:
    """The mean [..., d] of samples [n, ..., d], in float64."""
    return samples.to(torch.float64).mean(0)


def winsorized_mean(samples: torch.Tensor, quantile: float = QUANTILE) -> torch.Tensor:
    """The winsorized mean [..., d] of samples [n, ..., d], in float64, coordinate by coordinate.

    Of each coordinate's values, the share `1 - quantile` that is largest becomes the next largest, and the same share
    that is smallest the next smallest. The count is rounded up, so that not even one of few outliers counts in full.
    """
    n = len(samples)
    clipped = min(math.ceil((1 - quantile) * n - 1e-9), (n - 1) // 2)
    ordered = samples.to(torch.float64).sort(0).values
    return ordered.clamp(ordered[clipped], ordered[n - 1 - clipped]).mean(0)


def geometric_median(samples: torch.Tensor) -> torch.Tensor:
    """The point [..., d] with the least sum of Euclidean distances to the samples [n, ..., d], in float64.

    Weiszfeld's iteration as modified by Vardi and Zhang (2000), which does not stop at a sample that is not the median,
    until steps are below `CONVERGED` of the typical distance.
    """
    start = samples.to(torch.float64).median(0).values
    x = samples.to(torch.float64) - start  # so that steps are not lost in the rounding of a large common part
    scale = x.norm(dim=-1, keepdim=True).mean(0)
    median = torch.zeros_like(start)
    for _ in range(STEPS):
        offsets = x - median  # [n, ..., d]
        distances = offsets.norm(dim=-1, keepdim=True)
        coincident = distances <= 1e-14 * scale
        weights = torch.where(coincident, 0.0, 1 / torch.where(coincident, 1.0, distances))
        force = (weights * offsets).sum(0)  # with which all samples but the coincident pull
        pull, total = force.norm(dim=-1, keepdim=True), weights.sum(0)
        free = (1 - coincident.sum(0) / torch.where(pull > 0, pull, 1.0)).clamp(min=0)
        step = torch.where(total > 0, free * force / torch.where(total > 0, total, 1.0), 0.0)
        median = median + step
        if (step.norm(dim=-1, keepdim=True) <= CONVERGED * distances.median(0).values).all():
            break
    return start + median
