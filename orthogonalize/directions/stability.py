"""Stability: how alike the directions of two independent draws of the prompts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .finders.registry import FINDERS
from .means import find_mean
from .orthogonal import orthogonal_to

if TYPE_CHECKING:
    from .fit import DirectionSettings


def spearman_brown(cosine: torch.Tensor, times: float) -> torch.Tensor:
    """The cosine expected for samples `times` as large, from that of two independent samples.

    Spearman-Brown's formula, `t c / (1 + (t - 1) c)`: exact for the mean of independent samples, whose error's square
    falls as 1/n. Negative cosines, which say that nothing was found, stay as they are.
    """
    return torch.where(cosine > 0, times * cosine / (1 + (times - 1) * cosine), cosine)


def split_half_cosines(
    pools: Sequence[torch.Tensor], train: Sequence[int], settings: DirectionSettings
) -> dict[str, torch.Tensor]:
    """By finder, cosines [draws, positions, layers] between the first directions of two disjoint halves of the prompts.

    Halves share no prompt, so that their cosine is that of independent draws; each draw halves the pools anew. Where a
    half is smaller than what the run's own directions were fitted to, the cosine is corrected to that size (see
    `spearman_brown`); it is not where the pools hold spare prompts enough.

    Args:
        pools: activations [prompts, positions, layers, d] of the positive and the negative side.
        train: how many prompts per side the run's directions were fitted to.
        settings: those of the run; `seeds` is the number of draws.
    """
    found: dict[str, list[torch.Tensor]] = {}
    sizes = [min(len(pool) // 2, own) for pool, own in zip(pools, train, strict=True)]
    times = max(1.0, sum(train) / max(sum(sizes), 1))
    for draw in range(settings.seeds):
        drawn = replace(settings, seed=settings.seed + draw)
        generator = torch.Generator().manual_seed(drawn.seed)
        orders = [torch.randperm(len(pool), generator=generator).to(pool.device) for pool in pools]
        halves = [
            [pool[order[k * size : (k + 1) * size]] for pool, order, size in zip(pools, orders, sizes, strict=True)]
            for k in range(2)
        ]
        for name in settings.finders:
            first, second = (FINDERS[name].first_direction(half[0], half[1], drawn) for half in halves)
            if first is None or second is None:
                continue
            if settings.orthogonal_to:
                first, second = (
                    orthogonal_to(direction, find_mean(settings.mean)(half[1]))
                    for direction, half in zip((first, second), halves, strict=True)
                )
            cosine = torch.nn.functional.cosine_similarity(first, second, dim=-1).cpu()
            found.setdefault(name, []).append(spearman_brown(cosine, times))
    return {name: torch.stack(cosines) for name, cosines in found.items()}
