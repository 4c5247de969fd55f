"""actadd: add a constant vector along a direction (activation addition; Arditi et al. 2024, eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .base import EditMethod

if TYPE_CHECKING:
    import torch

    from ...core.interventions import AffineMap, Intervention
    from ..config import EditConfig
    from ..scopes import Scope


class ActivationAddition(EditMethod):
    """Adds `coefficient` (by default the length of the mean difference) times the unit direction."""

    name = "actadd"
    summary = "adds a constant vector"
    formula = "h -> h + coefficient * r at one layer, with the unit direction r, as a bias"
    finders = ("dim", "inlp")
    needs = "direction, layer; optionally a length (`--coefficient`)"
    options = frozenset({"coefficient"})
    default_scope = "one"
    one_direction = True
    adds = True
    swept_scopes = ("one",)  # over more layers, one constant per layer adds up in the stream

    def map(self, choice: EditConfig, basis: torch.Tensor, norm: float) -> AffineMap:
        from ...core.interventions import shift

        length = norm if choice.coefficient is None else choice.coefficient
        return shift(choice.strength * length * basis[0])

    def place(
        self,
        scope: Scope,
        layer_count: int,
        map_for: Callable[[int], AffineMap | None],
        source: int | None,
        ranking: Sequence[int] | None,
    ) -> Intervention:
        from ..scopes import shift_sites

        def vector_for(layer: int) -> torch.Tensor | None:
            found = map_for(layer)
            return None if found is None else found.s

        return shift_sites(scope, layer_count, vector_for, source, ranking)


METHOD = ActivationAddition()
