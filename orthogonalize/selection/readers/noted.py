"""Scoring of directions by a meter that first notes what it is asked, so that many candidates are measured together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ...core.journal import Journal
from ...data.prompts import Side
from ...directions.direction_set import Directions
from ..candidates import Candidate, Mean
from ..readouts import Readout
from .direction_scoring import DirectionScoring, Places, adds_mean_difference, score_key
from .meters import ScoredMaps
from .resident_scores import score_candidates

Ids = Sequence[Sequence[int]]
Key = tuple[int, str]  # layer, finder


@dataclass
class Request:
    """What is asked of a meter, and the scores by map and prompt once they are measured."""

    edits: ScoredMaps
    kl: bool
    scores: torch.Tensor


@dataclass
class NotingMeter:
    """A meter that is asked twice: first it notes what it is asked, and later it gives the same answers in turn."""

    prompts: dict[Side, Ids]
    noted: list[Request] = field(default_factory=list)
    measured: Iterator[Request] | None = None

    def behaviour(self, edits: ScoredMaps) -> torch.Tensor:
        return self._ask(edits, kl=False)

    def kl(self, edits: ScoredMaps) -> torch.Tensor:
        return self._ask(edits, kl=True)

    def _ask(self, edits: ScoredMaps, kl: bool) -> torch.Tensor:
        if self.measured is None:
            scores = torch.zeros(len(edits.maps.s), len(self.prompts[edits.side]), dtype=torch.float64)
            self.noted.append(Request(edits, kl, scores))
            return scores
        return next(self.measured).scores

    def answer(self) -> None:
        """From now on, give the answers in turn."""
        self.measured = iter(self.noted)


class NotedScoring:
    """Scores of the directions of a run on val prompts, by side.

    `places` are the positions and layers whose directions are scored; `layer_norm`: whether the model has LayerNorms.
    """

    def __init__(
        self,
        prompts: dict[Side, Ids],
        directions: Directions,
        readout: Readout,
        everywhere: bool,
        places: Places,
        layer_norm: bool,
    ) -> None:
        self.prompts, self.directions, self.readout = prompts, directions, readout
        self.everywhere, self.places, self.layer_norm = everywhere, places, layer_norm

    def missing(self, finders: Sequence[str], known: Journal) -> list[Key]:
        """What `known` does not contain yet."""
        keys = [(layer, finder) for layer in self.places.layers for finder in finders]
        return [key for key in keys if score_key(key[1], key[0]) not in known]

    def asked(self, keys: Sequence[Key], known: Journal) -> NotingMeter:
        """A meter that has noted all that is to be measured for `keys`."""
        meter = NotingMeter(self.prompts)
        self._candidates(keys, known, meter)
        return meter

    def put(self, keys: Sequence[Key], known: Journal, meter: NotingMeter) -> None:
        """Add the candidates of `keys` to `known`, once what `meter` noted is measured."""
        meter.answer()
        candidates = self._candidates(keys, known, meter)
        known.put({score_key(finder, layer): [c.row() for c in each] for (layer, finder), each in candidates.items()})

    def candidates(self, finders: Sequence[str], known: Journal) -> list[Candidate]:
        """All of them, from `known`."""
        return score_candidates(
            None, [], [], self.directions, finders, self.readout, self.everywhere, known, self.places
        )

    def _candidates(self, keys: Sequence[Key], known: Journal, meter: NotingMeter) -> dict[Key, list[Candidate]]:
        scoring = DirectionScoring(meter, self.directions, self.everywhere, self.layer_norm)
        induced = _induced(known, self.directions)
        return {(layer, finder): scoring.layer(finder, layer, self.places.positions, induced) for layer, finder in keys}


def _induced(known: Journal, directions: Directions) -> dict[tuple[int, int], Mean]:
    """The scores of added mean differences that `known` has, by position and layer (see `DirectionScoring.layer`)."""
    rows = [row for key, rows in known.done.items() if key.startswith("candidates:") for row in rows]
    found = [Candidate.from_row(row) for row in rows]
    scored = (c for c in found if adds_mean_difference(c.finder, directions))
    return {(c.position, c.layer): Mean(c.induce, c.induce_ci95) for c in scored if c.induce is not None}
