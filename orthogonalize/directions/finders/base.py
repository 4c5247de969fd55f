"""The base class of direction finders, each a way to find what separates the two sides of a contrast.

The modules in this folder import torch inside functions only: the command line reads the registry for its help.
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
    """The results of a finder for a group of layers.

    `tensors` are [positions, layers, ...] each, stored in directions.safetensors as `FINDER.KEY`. `subspaces` maps
    (index of the position, index of the layer) to INLP's subspace.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    subspaces: Mapping[tuple[int, int], Subspace] = field(default_factory=dict)


class DirectionFinder:
    """A direction finder. A subclass whose `fit` returns a tensor `basis` needs no other method.

    Attributes:
        name: the value of `--finders`; it prefixes the finder's tensors in directions.safetensors.
        title: the finder's name in figures.
        summary: what it finds, for `extract --help`.
        needs_samples: false if the means of the two sides are enough.
        adds_mean_difference: whether its first direction is that of the mean difference, so that adding it is scored
            only once for all such finders.
        lacking: how the message begins for a place without a direction.
    """

    name: str
    title: str
    summary: str
    needs_samples = True
    adds_mean_difference = False
    lacking = "the two sides have no"

    def fit(self, positive: torch.Tensor, negative: torch.Tensor, settings: DirectionSettings) -> Fitted:
        """Fit to the activations [prompts, positions, layers, d] of each side."""
        return Fitted()

    def first_direction(
        self, positive: torch.Tensor, negative: torch.Tensor, settings: DirectionSettings
    ) -> torch.Tensor | None:
        """The first direction [positions, layers, d] of one draw of the prompts, to measure its stability; or None."""
        return None

    def found(self, directions: Directions) -> bool:
        """Whether `directions` contain results of this finder."""
        return f"{self.name}.basis" in directions.tensors

    def basis(self, directions: Directions, position: int, layer: int, rank: int | None = None) -> torch.Tensor | None:
        """The first `rank` rows of the orthonormal basis [k, d] at a position and layer; None without a basis there.

        The default takes the nonzero rows of the tensor `FINDER.basis` [positions, layers, k, d]. The first row should
        point to the positive side.
        """
        from ...core.interventions import orthonormal

        if not self.found(directions):
            return None
        rows = directions.tensors[f"{self.name}.basis"][directions.positions.index(position), layer]
        basis = orthonormal(rows[rows.any(-1)][:rank])
        return basis if len(basis) else None

    def removal(self, directions: Directions, position: int, layer: int) -> AffineMap | None:
        """The map that removes everything found at a position and layer; None if nothing was found."""
        from ...core.interventions import removal

        basis = self.basis(directions, position, layer)
        return None if basis is None else removal(basis)

    def probed_removals(self, directions: Directions, position: int, layer: int) -> list[AffineMap]:
        """The maps that `extract` tests with a fresh probe."""
        whole = self.removal(directions, position, layer)
        return [] if whole is None else [whole]

    def leading(self, directions: Directions, position: int, layer: int, accuracy: float) -> int | None:
        """The number of directions found before a classifier's held-out accuracy fell below `accuracy`.

        None for finders that train no classifiers, and for places without a direction.
        """
        return None

    def axis(self, directions: Directions, position: int, layer: int) -> torch.Tensor | None:
        """The unit direction [d] that figures compare with those of other finders; None without one."""
        basis = self.basis(directions, position, layer)
        return None if basis is None else basis[0]

    def accuracy(self, directions: Directions, position: int, layer: int) -> float | None:
        """The held-out accuracy of the first classifier; None for finders that train none."""
        return None
