"""leace: make the two sides' means equal, with the least change to the stream (Belrose et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...core.errors import OrthogonalizeError
from .base import EditMethod

if TYPE_CHECKING:
    import torch

    from ...core.interventions import AffineMap, Intervention
    from ...directions.direction_set import Directions
    from ..config import EditConfig


class LeastSquaresErasure(EditMethod):
    name = "leace"
    summary = "makes the two sides' means equal, moving the stream least"
    formula = "h -> h - P (h - m), with the least-squares eraser P and the mean m"
    needs = "fitted covariances"
    finders = ("leace",)
    options = frozenset({"orthogonal"})

    def restores_mean(self, choice: EditConfig) -> bool:
        return True

    def from_basis(
        self,
        choice: EditConfig,
        basis: torch.Tensor,
        norm: float,
        layer_count: int,
        ranking: Sequence[int] | None = None,
    ) -> Intervention:
        raise OrthogonalizeError("leace needs the covariances that extract fits; use --run, extracted with leace")

    def from_directions(
        self, choice: EditConfig, directions: Directions, ranking: Sequence[int] | None = None
    ) -> Intervention:
        from ..erasure import erasure

        return erasure(choice, directions, ranking)

    def on_stream(self, choice: EditConfig, directions: Directions, intervention: Intervention) -> AffineMap:
        """The whole eraser; of the writes, only one has the shift that restores the mean."""
        assert choice.position is not None
        assert choice.layer is not None
        eraser = directions.eraser(choice.position, choice.layer, choice.orthogonal)
        assert eraser is not None
        return eraser.affine(choice.strength)


METHOD = LeastSquaresErasure()
