"""What a direction finder is: one way to find what tells the two sides of a contrast apart.

Files in this folder import torch inside functions only: the command line reads the registry for its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ...core.interventions import AffineMap
    from ..direction_set import Directions
    from ..fit import DirectionSettings
    from ..inlp.nullspace import Subspace


@dataclass(frozen=True)
class Fitted:
    """What a finder found in a group of layers.

    `tensors` are [positions, layers, ...] each, stored in directions.safetensors as `FINDER.KEY`. `subspaces`
    maps (index of the position, index of the layer) to what INLP found there.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    subspaces: Mapping[tuple[int, int], Subspace] = field(default_factory=dict)


class DirectionFinder:
    """A direction finder; subclasses say what they fit, and how to read it from a `Directions`.

    `name` is the word for `--finders`; `title` names it in figures. `needs_samples` is false where the two
    sides' means are enough. `adds_mean_difference` says that the first direction is the mean difference's, so that
    adding it needs to be scored only once for all such finders. `lacking` begins the message where nothing was found.
    """

    name: str
    title: str
    summary: str
    needs_samples = True
    adds_mean_difference = False
    lacking = "the two sides have no"

    def fit(self, positive: torch.Tensor, negative: torch.Tensor, settings: DirectionSettings) -> Fitted:
        """Fit to activations [prompts, positions, layers, d] of both sides."""
        return Fitted()

    def first_direction(self, positive: torch.Tensor, negative: torch.Tensor, seed: int) -> torch.Tensor | None:
        """The first direction [positions, layers, d] of one draw of the prompts, by which stability is measured."""
        return None

    def found(self, directions: Directions) -> bool:
        """Whether `directions` hold anything of this finder's."""
        return f"{self.name}.basis" in directions.tensors

    def basis(self, directions: Directions, position: int, layer: int, rank: int | None = None) -> torch.Tensor | None:
        """The orthonormal basis [k, d] found there, its first `rank` rows; None where there is none.

        By default the rows of the tensor `FINDER.basis` [positions, layers, k, d] that are not zero.
        """
        from ...core.interventions import orthonormal

        if not self.found(directions):
            return None
        rows = directions.tensors[f"{self.name}.basis"][directions.positions.index(position), layer]
        basis = orthonormal(rows[rows.any(-1)][:rank])
        return basis if len(basis) else None

    def removal(self, directions: Directions, position: int, layer: int) -> AffineMap | None:
        """The map that removes everything found there; None where that is nothing."""
        from ...core.interventions import removal

        basis = self.basis(directions, position, layer)
        return None if basis is None else removal(basis)

    def probed_removals(self, directions: Directions, position: int, layer: int) -> list[AffineMap]:
        """The maps whose effect a fresh probe tests for a run."""
        whole = self.removal(directions, position, layer)
        return [] if whole is None else [whole]

    def axis(self, directions: Directions, position: int, layer: int) -> torch.Tensor | None:
        """The unit direction [d] that figures compare with other finders'; None where there is none."""
        basis = self.basis(directions, position, layer)
        return None if basis is None else basis[0]

    def accuracy(self, directions: Directions, position: int, layer: int) -> float | None:
        """Held-out accuracy of the first classifier, for finders that train one."""
        return None
