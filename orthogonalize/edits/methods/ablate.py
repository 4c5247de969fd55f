"""ablate: remove the component along one direction (Arditi et al. 2024, eq. 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import EditMethod

if TYPE_CHECKING:
    import torch

    from ...core.interventions import AffineMap
    from ..config import EditConfig


class Ablate(EditMethod):
    name = "ablate"
    summary = "removes the component along one direction"
    needs = "difference of means"
    one_direction = True
    projects = True

    def map(self, choice: EditConfig, basis: torch.Tensor, norm: float) -> AffineMap:
        from ...core.interventions import removal

        return removal(basis, choice.strength)


METHOD = Ablate()
