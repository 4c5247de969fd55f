"""dim: the difference of the two sides' means (diff-in-means; Arditi et al. 2024, eq. 1), arithmetic or robust."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import DirectionFinder

if TYPE_CHECKING:
    import torch

    from ..direction_set import Directions
    from ..fit import DirectionSettings


class DiffInMeans(DirectionFinder):
    name = "dim"
    title = "diff-in-means"
    summary = "difference of the two sides' mean activations"
    needs_samples = False
    adds_mean_difference = True

    def first_direction(
        self, positive: torch.Tensor, negative: torch.Tensor, settings: DirectionSettings
    ) -> torch.Tensor:
        from ..means import find_mean

        mean = find_mean(settings.mean)
        return mean(positive) - mean(negative)

    def found(self, directions: Directions) -> bool:
        return True

    def basis(self, directions: Directions, position: int, layer: int, rank: int | None = None) -> torch.Tensor | None:
        return directions.difference_basis(position, layer)


FINDER = DiffInMeans()
