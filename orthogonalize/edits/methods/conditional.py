"""conditional: take directions out of a write only where its input looks like the target's (see `edits.fitting`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...core.errors import OrthogonalizeError
from .base import EditMethod

if TYPE_CHECKING:
    import torch

    from ...core.interventions import Intervention
    from ...directions.direction_set import Directions
    from ..config import EditConfig


class Conditional(EditMethod):
    """Ridge regression on the inputs of every write matrix (see `directions.conditional`); no direction is removed
    where the input does not call for it."""

    name = "conditional"
    summary = "removes directions only where the input is like the target's"
    formula = "W -> W - R^T C, with the directions R, and C fitted to what W reads"
    needs = "directions of every layer, and the model itself"
    options = frozenset(
        {"span", "components", "target_weight", "preserve_weight", "first_weight", "ridge", "sequential"}
    )
    fitted = True
    grid = ({"target_weight": 0.1}, {"target_weight": 0.3}, {"target_weight": 1.0})

    def scopes(self, layer_count: int) -> tuple[str, ...]:
        """The upper half: what a lower layer writes is not the behaviour yet, and harmless prompts use it more."""
        return (f"from:{layer_count // 2}",)

    def from_basis(
        self,
        choice: EditConfig,
        basis: torch.Tensor,
        norm: float,
        layer_count: int,
        ranking: Sequence[int] | None = None,
    ) -> Intervention:
        raise OrthogonalizeError("conditional is fitted to the prompts of a run; use --run")

    def from_directions(
        self, choice: EditConfig, directions: Directions, ranking: Sequence[int] | None = None
    ) -> Intervention:
        raise OrthogonalizeError("conditional is fitted to a model; directions alone do not determine it")


METHOD = Conditional()
