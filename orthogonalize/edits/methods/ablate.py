"""ablate: remove the component along one direction (Arditi et al. 2024, eq. 4), or bring it to the harmless mean's.

With `--to harmless-mean` it is the projection of affine concept editing (ACE; Marshall, Scherlis and Belrose 2024).
"""

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


class Ablate(EditMethod):
    name = "ablate"
    summary = "removes the component along one direction"
    formula = "W -> W - strength * r (r^T W), with the unit direction r"
    needs = "difference of means"
    options = frozenset({"to"})
    one_direction = True
    projects = True

    def restores_mean(self, choice: EditConfig) -> bool:
        return choice.to == "harmless-mean"

    def map(self, choice: EditConfig, basis: torch.Tensor, norm: float) -> AffineMap:
        from ...core.interventions import removal

        return removal(basis, choice.strength)

    def from_basis(
        self,
        choice: EditConfig,
        basis: torch.Tensor,
        norm: float,
        layer_count: int,
        ranking: Sequence[int] | None = None,
    ) -> Intervention:
        if self.restores_mean(choice):
            raise OrthogonalizeError("--to harmless-mean needs the means that extract stores; use --run")
        return super().from_basis(choice, basis, norm, layer_count, ranking)

    def from_directions(
        self, choice: EditConfig, directions: Directions, ranking: Sequence[int] | None = None
    ) -> Intervention:
        from ..erasure import ablation_to_mean

        if self.restores_mean(choice):
            return ablation_to_mean(choice, directions, self.finder(directions), ranking)
        return super().from_directions(choice, directions, ranking)

    def on_stream(self, choice: EditConfig, directions: Directions, intervention: Intervention) -> AffineMap:
        """With the whole shift; of the writes over layers, only the last has it."""
        from dataclasses import replace

        removed = super().on_stream(choice, directions, intervention)
        if not self.restores_mean(choice):
            return removed
        assert choice.position is not None
        assert choice.layer is not None
        return replace(removed, s=removed.u @ (removed.v.mT @ directions.negative_mean(choice.position, choice.layer)))


METHOD = Ablate()
