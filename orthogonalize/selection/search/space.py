"""The edits that the search tries: where it starts, and what is near an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...architectures.schema import architecture_of
from ...checkpoints.checkpoint import Checkpoint
from ...core.errors import OrthogonalizeError, UnansweredError
from ...core.progress import note
from ...directions.direction_set import Directions
from ...edits.bake import bake
from ...edits.build import finder_of, intervention_from_directions
from ...edits.config import Components, EditConfig
from ...edits.methods.registry import DEFAULT, METHODS
from ...edits.scopes import parse_scope
from ...engines.experiment.ask import ask_server
from ..candidates import Candidate

LARGEST_WEIGHT = 10.0  # of the target in a regression; from there on, the target alone counts


def reads_can_be_baked(source: Checkpoint, directions: Directions) -> bool:
    """Whether edits of what is read (scope `from:`) can be written into the weights of `source`.

    Some families cannot take them: their heads stay tied, or read a norm's bias and have none to keep it by.
    """
    position, layer = directions.positions[-1], directions.layer_count
    choice = EditConfig(method=DEFAULT, scope=f"from:{layer - 1}", position=position, layer=layer)
    layer_norm = architecture_of(source.config).norms.kind == "layer"
    try:
        bake(source, intervention_from_directions(choice, directions, layer_norm=layer_norm), ask_server)
    except UnansweredError as error:
        note(f"edits of what is read are not tried: {error}")
        return False
    except OrthogonalizeError:
        return False
    return True


@dataclass(frozen=True)
class SearchSpace:
    """Edits along extracted directions, of which `ranked` are the candidates, best first.

    `reads`: whether edits of what is read (scope `from:`) can be written into the model. `strengthen`: whether the
    behaviour is to be extended, and not removed. `components`: what conditional edits are fitted to.
    """

    directions: Directions
    ranked: Sequence[Candidate]
    reads: bool = True
    strengthen: bool = False
    components: Components = "both"

    @property
    def _layers(self) -> int:
        return self.directions.layer_count

    @property
    def largest_step(self) -> int:
        """The number of layers by which the search first moves the ends of a span."""
        return max(1, self._layers // 6)

    def starts(self) -> list[EditConfig]:
        """The edits along directions to try first: removals, or additions where the behaviour is to be extended."""
        return self._additions() if self.strengthen else self._removals()

    def _ranked(self, finder: str) -> list[Candidate]:
        """The candidates of `finder` that pass all filters, or all of them if none does."""
        own = [c for c in self.ranked if c.finder == finder]
        return [c for c in own if not c.failed] or own

    def _additions(self) -> list[EditConfig]:
        """Additions at the layers of the best candidates, of their own length, of half and twice of it."""
        method = next(each for each in METHODS.values() if each.adds)
        best = self._ranked(finder_of(method.name, self.directions))[:2]
        return [
            EditConfig(method=method.name, scope="one", position=c.position, layer=c.layer, strength=strength)
            for strength in (1.0, 0.5, 2.0)
            for c in best
        ]

    def _removals(self, method: str = DEFAULT) -> list[EditConfig]:
        """Removals, every scope with the best direction before any with another.

        Scopes are all writes, upper and middle spans of writes, and spans of reads; the directions are the best
        candidate's, each layer's own at the same position, and that of the best candidate of another layer. The first
        edit is thus the plain one: the best candidate's direction at every write.
        """
        good = self._ranked(finder_of(method, self.directions))
        best = good[0]
        others = [c for c in good if c.layer != best.layer][:1]
        count = self._layers
        writes = ["all", f"layers:{count // 2}-{count - 1}", f"layers:{count // 3}-{count * 4 // 5}"]
        reads = [f"from:{count * share // 10}" for share in (8, 9, 7)] if self.reads else []
        scopes = list(dict.fromkeys([*writes[:2], *reads[:1], *writes[2:], *reads[1:]]))
        along = [EditConfig(method=method, position=c.position, layer=c.layer) for c in (best, *others)]
        along.insert(1, EditConfig(method=method, position=best.position, per_layer=True))
        return [direction.model_copy(update={"scope": scope}) for direction in along for scope in scopes]

    def fitted_starts(self) -> list[EditConfig]:
        """The conditional edits to try first: three spans of layers, each with its target weight, and two
        kinds of directions.

        A target weight that is too small leaves part of the behaviour, and one that is too large costs; which is which
        depends on the model. The fewer layers are edited, the larger a weight they need, and often the less it costs.
        """
        own = EditConfig(
            method="conditional",
            scope=f"from:{self._layers // 2}",
            position=self.directions.positions[-1],
            per_layer=True,
            components=self.components,
        )
        upper = {"scope": f"from:{self._layers * 4 // 5}", "target_weight": 3.0}
        between = {"scope": f"from:{self._layers * 3 // 5}", "target_weight": 1.0}
        others: list[dict[str, Any]] = [upper, between, {"span": "positions"}]
        return list(dict.fromkeys([own, *(own.model_copy(update=other) for other in others)]))

    def neighbours(self, choice: EditConfig, step: int) -> list[EditConfig]:
        """The edits near `choice`: one end of its span moved by `step` layers, or another setting by one notch."""
        if METHODS[choice.method].fitted:
            return self._near_fits(choice, step)
        if METHODS[choice.method].adds:
            return self._near_additions(choice)
        near = [
            choice.model_copy(update={"strength": round(choice.strength + change, 2)})
            for change in (-0.2, 0.2, -0.1, 0.1)
            if 0.2 <= choice.strength + change <= 1.6
        ]
        if choice.site_strengths:  # of this span and direction
            return near
        near = [choice.model_copy(update={"scope": scope}) for scope in self._near_scopes(choice.scope, step)] + near
        positions = self.directions.positions
        near += [choice.model_copy(update={"position": p}) for p in positions if abs(p - (choice.position or 0)) == 1]
        if choice.layer is not None and not choice.per_layer:
            near += [
                choice.model_copy(update={"layer": choice.layer + change})
                for change in (-1, 1)
                if 1 <= choice.layer + change < self._layers
            ]
        return near

    def _near_additions(self, choice: EditConfig) -> list[EditConfig]:
        near = [choice.model_copy(update={"strength": round(choice.strength * by, 2)}) for by in (1.4, 0.7)]
        layers = [(choice.layer or 0) + change for change in (1, -1)]
        return near + [choice.model_copy(update={"layer": layer}) for layer in layers if 1 <= layer < self._layers]

    def _near_fits(self, choice: EditConfig, step: int) -> list[EditConfig]:
        """Other strengths of the same fit, which cost nothing, before other fits."""
        near = [
            choice.model_copy(update={"strength": round(choice.strength + change, 2)})
            for change in (0.15, -0.15, 0.3)
            if 0.5 <= choice.strength + change <= 1.5
        ]
        fits: list[dict[str, Any]] = [
            {"target_weight": round(choice.target_weight * factor, 4)}
            for factor in (3.0, 1 / 3)
            if 0.01 <= choice.target_weight * factor <= LARGEST_WEIGHT
        ]
        first = parse_scope(choice.scope).layers[0]
        fits += [{"scope": f"from:{start}"} for start in (first + step, first - step) if 0 < start < self._layers]
        return near + [choice.model_copy(update={**other, "strength": 1.0}) for other in fits]

    def _near_scopes(self, text: str, step: int) -> list[str]:
        scope, count = parse_scope(text), self._layers
        if scope.kind == "from":
            return [f"from:{start}" for start in (scope.layers[0] + step, scope.layers[0] - step) if 0 < start <= count]
        if scope.kind not in ("all", "layers"):
            return []
        first, last = (scope.layers[0], scope.layers[-1]) if scope.layers else (0, count - 1)
        spans = [(first + step, last), (first, last - step), (first - step, last), (first, last + step)]
        return [f"layers:{a}-{b}" if a < b else f"layers:{a}" for a, b in spans if 0 <= a <= b < count]
