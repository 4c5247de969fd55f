"""reflect: scale a subspace by 1 - alpha, which removes it at alpha 1 and mirrors it at alpha 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import EditMethod

if TYPE_CHECKING:
    import torch

    from ...core.interventions import AffineMap
    from ..config import EditConfig


class Reflect(EditMethod):
    name = "reflect"
    summary = "mirrors a subspace (alpha 2), or anything between leaving and mirroring it"
    formula = "W -> W - strength * alpha * U (U^T W), with the orthonormal directions U"
    needs = "INLP basis, or difference of means"
    finders = ("inlp", "dim")
    options = frozenset({"alpha", "rank"})
    grid = ({"alpha": 1.0}, {"alpha": 2.0})

    def map(self, choice: EditConfig, basis: torch.Tensor, norm: float) -> AffineMap:
        from ...core.interventions import removal

        return removal(basis, choice.strength * choice.alpha)


METHOD = Reflect()
