"""What an edit method is: how directions become maps on the places that write to, or read, the residual stream.

Files in this folder import torch inside functions only: the command line reads the registry for its help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ...directions.finders.registry import FINDERS

if TYPE_CHECKING:
    import torch

    from ...core.interventions import AffineMap, Intervention
    from ...directions.direction_set import Directions
    from ..config import EditConfig
    from ..scopes import Scope


class EditMethod:
    """An edit method; a subclass says which map it puts at a site.

    Attributes:
        name: the word for `--method`.
        summary, needs: what it does, and what it needs: a row of the README's table.
        finders: whose directions it takes, best first.
        options: fields of `EditConfig` that belong to some methods only, and to this one.
        default_scope: the scope where none is given.
        one_direction: whether it takes a single direction rather than a subspace.
        adds: whether it adds a constant instead of removing a component.
        grid: settings that a sweep tries, each as fields of `EditConfig`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[str] = "a direction"
    finders: ClassVar[tuple[str, ...]] = ("dim",)
    options: ClassVar[frozenset[str]] = frozenset()
    default_scope: ClassVar[str] = "all"
    one_direction: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    grid: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def finder(self, directions: Directions) -> str:
        """The first of `finders` that found something in `directions`, else the last."""
        return next((name for name in self.finders if FINDERS[name].found(directions)), self.finders[-1])

    def map(self, choice: EditConfig, basis: torch.Tensor, norm: float) -> AffineMap:
        """The map along an orthonormal `basis` [k, d]; `norm` is the length of the mean difference there."""
        raise NotImplementedError

    def place(
        self,
        scope: Scope,
        layer_count: int,
        map_for: Callable[[int], AffineMap | None],
        source: int | None,
        ranking: Sequence[int] | None,
    ) -> Intervention:
        """Put the maps on the sites of `scope` (see `scopes.map_sites`)."""
        from ..scopes import map_sites

        return map_sites(scope, layer_count, map_for, source, ranking)

    def from_basis(
        self,
        choice: EditConfig,
        basis: torch.Tensor,
        norm: float,
        layer_count: int,
        ranking: Sequence[int] | None = None,
    ) -> Intervention:
        """The intervention of `choice` along one shared orthonormal `basis` [k, d]."""
        from ..build import shared_map

        return shared_map(self, choice, basis, norm, layer_count, ranking)

    def from_directions(
        self, choice: EditConfig, directions: Directions, ranking: Sequence[int] | None = None
    ) -> Intervention:
        """The intervention of `choice` along extracted directions, one shared or each layer's own."""
        from ..build import maps_along

        return maps_along(self, choice, directions, ranking)

    def on_stream(self, choice: EditConfig, directions: Directions, intervention: Intervention) -> AffineMap:
        """What the edit does to a stream as a whole, where hooks can reach it."""
        return next(iter(intervention.writes.values()))
