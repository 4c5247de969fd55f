"""Make the intervention of any edit of a run: from its directions, or fitted to its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import OrthogonalizeError
from ..core.interventions import Intervention
from ..directions.direction_set import Directions
from ..edits.build import finder_of, intervention_from_directions
from ..edits.config import EditConfig
from ..edits.methods.registry import METHODS
from .candidates import Candidate, layer_ranking
from .fits import Fits


@dataclass(frozen=True)
class EditBuilder:
    """Makes the interventions of edits, as they are baked.

    Attributes:
        directions: the run's.
        ranked: its candidates, best first.
        layer_norm: whether the model has LayerNorms.
        fits: the run's fitted edits; None for a run without its model.
    """

    directions: Directions
    ranked: Sequence[Candidate]
    layer_norm: bool
    fits: Fits | None = None

    def __call__(self, choice: EditConfig) -> Intervention:
        """The intervention of `choice`.

        Raises:
            OrthogonalizeError: the run has no directions or answers for it.
        """
        ranking = layer_ranking(self.ranked, finder_of(choice.method, self.directions, choice.finder))
        if not METHODS[choice.method].fitted:
            return intervention_from_directions(choice, self.directions, ranking, layer_norm=self.layer_norm)
        if self.fits is None:
            raise OrthogonalizeError(f"{choice.method} is fitted to a model; directions alone do not determine it")
        return self.fits.intervention(choice, ranking)
