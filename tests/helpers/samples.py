"""Samples of two classes that differ along a few axes, as activations do."""

from __future__ import annotations

import torch


def two_sides(n=60, d=40, gap=1.5, m=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(d, min(d, 6), generator=generator))[0].T
    toward = sum(gap / (i + 1) * axis for i, axis in enumerate(axes))
    # As in real activations, some directions vary much more than others.
    scales = torch.exp(0.8 * torch.randn(d, generator=generator))
    positive = scales * torch.randn(n, d, generator=generator) + toward
    negative = scales * torch.randn(m or n, d, generator=generator) - toward
    return positive, negative
