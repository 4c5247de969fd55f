"""The base class of edit methods, which turn directions into maps at the write and read sites of a model.

The modules in this folder import torch inside functions only: the command line reads the registry for its help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.errors import OrthogonalizeError
from ...directions.finders.registry import FINDERS

if TYPE_CHECKING:
    import torch

    from ...core.interventions import AffineMap, Intervention
    from ...directions.direction_set import Directions
    from ..config import EditConfig
    from ..scopes import Scope


class EditMethod:
    """An edit method. A subclass defines `map`, which gives the map for one site.

    Attributes:
        name: the value of `--method`.
        summary, needs: what the method does and what it needs, as in the README's table.
        formula: what becomes of a write matrix W, or of the stream h, in one line of plain text.
        finders: names of the direction finders whose directions it takes, best first.
        options: the fields of `EditConfig` that only some methods accept, this one among them.
        default_scope: the scope where none is given.
        one_direction: whether it takes a single direction rather than a subspace; of extracted ones, the first.
        adds: whether it adds a constant instead of removing a component.
        projects: whether strength 1 leaves nothing of the direction; the model card then gives what rounding leaves.
        fitted: whether its maps are fitted to the model's own activations, not made from directions alone.
        grid: the settings that a sweep tries, each a mapping from fields of `EditConfig` to values.
        swept_scopes: the scopes that a sweep tries by default.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[str] = "a direction"
    formula: ClassVar[str] = "h -> h - U (V^T h) + s, for everything that is written into the stream h"
    finders: ClassVar[tuple[str, ...]] = ("dim",)
    options: ClassVar[frozenset[str]] = frozenset()
    default_scope: ClassVar[str] = "all"
    one_direction: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    projects: ClassVar[bool] = False
    fitted: ClassVar[bool] = False
    grid: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    swept_scopes: ClassVar[tuple[str, ...]] = ("one", "top:50%", "all")

    def scopes(self, layer_count: int) -> tuple[str, ...]:
        """The scopes that a sweep tries in a model of `layer_count` layers, of a fitted method its default first.

        By default, `swept_scopes`.
        """
        return self.swept_scopes

    def finder(self, directions: Directions, chosen: str | None = None) -> str:
        """The finder `chosen`, or else the first of `finders` that found something in `directions`, else the last.

        Raises:
            OrthogonalizeError: the method does not take the directions of `chosen`.
        """
        if chosen is not None and chosen not in self.finders:
            raise OrthogonalizeError(
                f"{self.name} does not take --finder {FINDERS.find(chosen).name}; it takes {' or '.join(self.finders)}"
            )
        return chosen or next((name for name in self.finders if FINDERS[name].found(directions)), self.finders[-1])

    def restores_mean(self, choice: EditConfig) -> bool:
        """Whether the shift of `choice` puts a mean back, so that it depends on what the norms see of that mean."""
        return False

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
        """Place the maps on the sites of `scope` (see `scopes.map_sites`)."""
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
        from ..build import place_shared_map

        return place_shared_map(self, choice, basis, norm, layer_count, ranking)

    def from_directions(
        self, choice: EditConfig, directions: Directions, ranking: Sequence[int] | None = None
    ) -> Intervention:
        """The intervention of `choice` along extracted directions: one shared direction, or each layer's own."""
        from ..build import place_maps_along

        return place_maps_along(self, choice, directions, ranking)

    def on_stream(self, choice: EditConfig, directions: Directions, intervention: Intervention) -> AffineMap:
        """The edit's effect on the whole stream as one map, for `sweep --semantics residual`."""
        return next(iter(intervention.writes.values()))
