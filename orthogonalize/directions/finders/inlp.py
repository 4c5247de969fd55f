"""inlp: iterative nullspace projection (Ravfogel et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import DirectionFinder, Fitted

if TYPE_CHECKING:
    import torch

    from ...core.interventions import AffineMap
    from ..direction_set import Directions
    from ..fit import DirectionSettings

# `--rank acc99` keeps the directions found before a classifier's held-out accuracy fell below 0.99.
RANK_BY_ACCURACY = {"acc99": 0.99, "acc95": 0.95}


class NullspaceProjection(DirectionFinder):
    name = "inlp"
    title = "INLP"
    summary = "directions of successive linear classifiers"
    lacking = "INLP found no"

    def fit(self, positive: torch.Tensor, negative: torch.Tensor, settings: DirectionSettings) -> Fitted:
        from ..inlp.nullspace import Subspaces, inlp

        found = inlp(
            positive,
            negative,
            settings.max_rank,
            seed=settings.seed,
            solver=settings.solver,
            classifier=settings.classifier,
        )
        assert isinstance(found, Subspaces)
        return Fitted(subspaces={(i, j): subspace for (i, j), subspace in found.items()})

    def first_direction(
        self, positive: torch.Tensor, negative: torch.Tensor, settings: DirectionSettings
    ) -> torch.Tensor:
        from ..inlp.nullspace import Subspaces, inlp

        found = inlp(positive, negative, 1, min_accuracy=0.0, seed=settings.seed)
        assert isinstance(found, Subspaces)
        basis = found.basis  # [positions, layers, 1 or 0, d]
        return basis[..., 0, :] if basis.shape[-2] else positive[0].new_zeros(positive[0].shape).double()

    def found(self, directions: Directions) -> bool:
        return bool(directions.subspaces)

    def basis(self, directions: Directions, position: int, layer: int, rank: int | None = None) -> torch.Tensor | None:
        from ...core.interventions import orthonormal

        found = directions.subspaces.get((position, layer))
        if found is None or not found.rank:
            return None
        return orthonormal(found.basis[:rank])

    def probed_removals(self, directions: Directions, position: int, layer: int) -> list[AffineMap]:
        """One map for each of the usual ranks: the first direction, acc99, acc95 and all."""
        from ...core.interventions import removal

        found = directions.subspaces.get((position, layer))
        if found is None or not found.rank:
            return []
        ranks = {1, found.rank, *(found.leading(accuracy) for accuracy in RANK_BY_ACCURACY.values())}
        return [removal(found.basis[:rank]) for rank in sorted(ranks)]

    def leading(self, directions: Directions, position: int, layer: int, accuracy: float) -> int | None:
        found = directions.subspaces.get((position, layer))
        return found.leading(accuracy) if found else None

    def accuracy(self, directions: Directions, position: int, layer: int) -> float | None:
        found = directions.subspaces.get((position, layer))
        return found.accuracies[0] if found else None


FINDER = NullspaceProjection()
