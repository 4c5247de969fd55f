"""leace: the least-squares concept eraser (Belrose et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import DirectionFinder, Fitted

if TYPE_CHECKING:
    import torch

    from ...core.interventions import AffineMap
    from ..direction_set import Directions
    from ..fit import DirectionSettings


class LeastSquaresEraser(DirectionFinder):
    """Erases the mean difference along the direction `v` that changes the stream least."""

    name = "leace"
    title = "LEACE"
    summary = "least-squares eraser of the mean difference"
    adds_mean_difference = True

    def fit(self, positive: torch.Tensor, negative: torch.Tensor, settings: DirectionSettings) -> Fitted:
        from ..leace import leace

        return Fitted({"readers": leace(positive, negative).v})

    def found(self, directions: Directions) -> bool:
        return directions.readers is not None

    def basis(self, directions: Directions, position: int, layer: int, rank: int | None = None) -> torch.Tensor | None:
        return directions.erased_basis(position, layer)

    def removal(self, directions: Directions, position: int, layer: int) -> AffineMap | None:
        eraser = directions.eraser(position, layer)
        return None if eraser is None else eraser.affine()

    def axis(self, directions: Directions, position: int, layer: int) -> torch.Tensor | None:
        eraser = directions.eraser(position, layer)
        return None if eraser is None else eraser.v / eraser.v.norm()


FINDER = LeastSquaresEraser()
