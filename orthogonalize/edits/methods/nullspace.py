"""nullspace: remove the subspace that INLP found (Ravfogel et al. 2020, eq. 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import EditMethod

if TYPE_CHECKING:
    import torch

    from ...core.interventions import AffineMap
    from ..config import EditConfig


class Nullspace(EditMethod):
    name = "nullspace"
    summary = "removes a subspace"
    formula = "W -> W - strength * U (U^T W), with the orthonormal directions U"
    needs = "INLP basis, in the order found"
    finders = ("inlp",)
    options = frozenset({"rank"})
    projects = True

    def map(self, choice: EditConfig, basis: torch.Tensor, norm: float) -> AffineMap:
        from ...core.interventions import removal

        return removal(basis, choice.strength)


METHOD = Nullspace()
