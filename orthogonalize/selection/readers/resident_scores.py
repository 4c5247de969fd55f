"""Score directions with a model that is whole in memory: all of them, or only those that by estimates are the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ...core.errors import OrthogonalizeError
from ...core.interrupts import check
from ...core.progress import duration, note, track
from ...data.prompts import Side
from ...directions.direction_set import Directions
from ...models.stream import Stream
from ..candidates import (
    MAX_KL,
    Candidate,
    Mean,
    MemoryStore,
    ScoreStore,
    common_place,
    first_pruned_layer,
    rank,
)
from ..readouts import Readout
from .direction_scoring import (
    MULTIPLIERS,
    DirectionScoring,
    Places,
    adds_mean_difference,
    score_key,
)
from .estimates import ScoreGradients, score_gradients
from .meters import ResidentMeter

Ids = Sequence[Sequence[int]]
ESTIMATED = 8  # prompts a side by which directions are put into the order in which they are scored
SCREENED = 4  # prompts by which those that break the model are told; also a side where there are no gradients
CLEARLY = 3.0  # times the largest KL: a direction that moves the few prompts further cannot pass with all of them


def resident_scoring(meter: ResidentMeter, directions: Directions, everywhere: bool) -> DirectionScoring:
    """The scoring of directions with a model that is whole in memory; see `score_candidates`."""
    layer_norm = Stream.of(meter.model).architecture.norms.kind == "layer"
    return DirectionScoring(meter, directions, everywhere, layer_norm)


def estimate_key(finder: str, layer: int) -> str:
    """The name of the estimates of a finder at a layer in a `ScoreStore`."""
    return f"estimated:{finder}:{layer}"


@dataclass
class _Scores:
    """Scores that are computed once, and kept in `known`. `seconds` is what a token takes, once known."""

    model: Any
    prompts: Mapping[Side, Ids]
    directions: Directions
    readout: Readout
    everywhere: bool
    known: ScoreStore
    induced: dict[tuple[int, int], Mean] = field(default_factory=dict)
    seconds: float | None = None

    @cached_property
    def gradients(self) -> Mapping[Side, ScoreGradients] | None:
        """Of the scores of a few prompts; None if the model has none."""
        few: dict[Side, Ids] = {side: ids[:ESTIMATED] for side, ids in self.prompts.items()}
        return score_gradients(self.model, few, self.readout)

    @cached_property
    def screening(self) -> DirectionScoring:
        """By few prompts."""
        few: dict[Side, Ids] = {side: ids[:SCREENED] for side, ids in self.prompts.items()}
        return resident_scoring(ResidentMeter(self.model, few, self.readout), self.directions, everywhere=False)

    @cached_property
    def meter(self) -> ResidentMeter:
        """Measures by all prompts."""
        started = time.monotonic()
        found = ResidentMeter(self.model, self.prompts, self.readout)
        tokens = sum(found.tokens(side, len(ids)) for side, ids in self.prompts.items())
        self.seconds = (time.monotonic() - started) / max(1.0, tokens)
        return found

    @cached_property
    def full(self) -> DirectionScoring:
        """By all prompts."""
        return resident_scoring(self.meter, self.directions, self.everywhere)

    def estimated(self, finder: str, layer: int, positions: Sequence[int]) -> list[Candidate]:
        """First-order estimates of bypass and induce, or the bypass of few prompts where there are no gradients."""

        def compute() -> list[Candidate]:
            if self.gradients is None:
                return self.screening.bypass(finder, layer, positions)
            return self.screening.estimates(finder, layer, positions, self.gradients)

        return self._kept(estimate_key(finder, layer), compute)

    def moved(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Estimated candidates of one finder and layer, with their KL by few prompts."""
        finder, layer = candidates[0].finder, candidates[0].layer
        positions = [c.position for c in candidates]

        def compute() -> list[Candidate]:
            found = self.screening.kl(finder, layer, positions)
            return [replace(c, kl=found[c.position].value, kl_ci95=found[c.position].ci95) for c in candidates]

        return self._kept(f"moved:{finder}:{layer}:{','.join(map(str, positions))}", compute)

    def scored(self, finder: str, layer: int, positions: Sequence[int], part: bool = False) -> list[Candidate]:
        """All scores by all prompts; `part`: of a part of the positions."""
        key = score_key(finder, layer) + (f":{','.join(map(str, positions))}" if part else "")
        found = self._kept(key, lambda: self.full.layer(finder, layer, positions, self.induced))
        if adds_mean_difference(finder, self.directions):
            scored = (c for c in found if c.induce is not None)
            self.induced.update({(c.position, c.layer): Mean(c.induce or 0.0, c.induce_ci95) for c in scored})
        return found

    def _kept(self, key: str, compute: Callable[[], list[Candidate]]) -> list[Candidate]:
        if key not in self.known:
            self.known.put({key: [c.row() for c in compute()]})
            check()
        return [Candidate.from_row(row) for row in self.known[key]]

    def forecast(self, finders: Sequence[str], places: Places, enough: int | None) -> str:
        """What will be scored, and about how long it takes.

        An edit at layer l costs the blocks from l on; every direction is removed once for each side, and added to the
        negative prompts at every length. A backward pass costs as much as a forward pass.
        """
        layers, positive, negative = self.directions.layer_count, *map(len, self.prompts.values())
        depth = sum((layers - layer) / layers for layer in places.layers) / len(places.layers)
        count = len(finders) * len(places.positions) * len(places.layers)
        tokens = self.meter.tokens  # and this measures the time of a token
        one = tokens("positive", positive) + (1 + len(MULTIPLIERS)) * tokens("negative", negative)
        if enough is None:
            passes = count * depth * one
            what = f"scoring {count} directions by {positive} + {negative} prompts"
        else:
            best = min(count, len(finders) * enough)
            first = sum(tokens(side, min(ESTIMATED, len(ids))) for side, ids in self.prompts.items())
            passes = 2 * first + best * depth * (tokens("negative", min(SCREENED, negative)) + one)
            what = f"estimating {count} directions, and scoring the best {best} by {positive} + {negative} prompts"
        return f"{what}: about {duration(passes * (self.seconds or 0.0))}"


def _of_every_place(scores: _Scores, finders: Sequence[str], places: Places) -> list[Candidate]:
    result: list[Candidate] = []
    with track("scoring directions", len(places.layers) * len(finders), "layers") as advance:
        for layer in places.layers:
            for finder in finders:
                result += scores.scored(finder, layer, places.positions)
                advance(1)
    return result


def _of_the_best(scores: _Scores, finders: Sequence[str], places: Places, enough: int) -> list[Candidate]:
    """Estimates of all, and scores by all prompts of the best `enough` of each finder."""
    estimated: dict[str, list[Candidate]] = {finder: [] for finder in finders}
    with track("estimating directions", len(places.layers) * len(finders), "layers") as advance:
        for layer in places.layers:
            for finder in finders:
                estimated[finder] += scores.estimated(finder, layer, places.positions)
                advance(1)
    scored: dict[str, list[Candidate]] = {}
    broken: dict[str, list[Candidate]] = {}
    with track("scoring the best directions", enough * len(finders), "directions") as advance:
        for finder, candidates in estimated.items():
            scored[finder], broken[finder] = _score_the_best(scores, candidates, enough, advance)
    ranked = rank([c for each in scored.values() for c in each])
    place = common_place(ranked) if ranked else None
    result: list[Candidate] = []
    for finder, candidates in estimated.items():
        found = {_place(c): replace(c, induce=None) for c in [*candidates, *broken[finder]]}
        found |= {_place(c): c for c in scored[finder]}
        if place in found.keys() - {_place(c) for c in scored[finder]}:  # so that finders can be compared there
            position, layer = place
            (found[place],) = scores.scored(finder, layer, [position], part=True)
        result += found.values()
    return result


def _place(candidate: Candidate) -> tuple[int, int]:
    return candidate.position, candidate.layer


def _promise(candidate: Candidate) -> float:
    """What orders estimates: a direction should take the behaviour away where it is removed, and bring it if added."""
    return candidate.bypass - (candidate.induce or 0.0)


def _score_the_best(
    scores: _Scores, estimated: Sequence[Candidate], enough: int, advance: Callable[[int], None]
) -> tuple[list[Candidate], list[Candidate]]:
    """The candidates of a finder that were scored by all prompts, and those whose KL by few is clearly too large.

    Directions without which the model is broken show no behaviour either: they come first in the order of bypass, and
    would each cost as much as a good one.
    """
    able = [c for c in estimated if c.layer < first_pruned_layer(c.layer_count) and math.isfinite(_promise(c))]
    left = sorted(able, key=_promise)
    scored: list[Candidate] = []
    broken: list[Candidate] = []
    while left and len(scored) < enough:
        most = enough - len(scored)
        portion, left = left[:most], left[most:]
        for layer in sorted({c.layer for c in portion}):
            here = scores.moved(sorted((c for c in portion if c.layer == layer), key=lambda c: c.position))
            usable = [c for c in here if not (c.kl or 0.0) > CLEARLY * MAX_KL]
            broken += [c for c in here if c not in usable]
            if usable:
                scored += scores.scored(usable[0].finder, layer, [c.position for c in usable], part=True)
            advance(len(usable))
    return scored, broken


def score_candidates(
    model: Any,
    positive: Ids,
    negative: Ids,
    directions: Directions,
    finders: Sequence[str],
    readout: Readout,
    everywhere: bool = False,
    known: ScoreStore | None = None,
    places: Places | None = None,
    enough: int | None = None,
) -> list[Candidate]:
    """Score every (finder, position, layer) on val prompts (token ids), editing at that layer only.

    Args:
        readout: scores the behaviour.
        everywhere: also score each edit at every write of the model (`global_bypass`, `global_kl`).
        known: a store for the scores; those that it contains are not computed again.
        places: the positions and layers to score; None scores all.
        enough: how many directions of a finder are scored: those that are the best by estimates of bypass and induce
            (see `ScoreGradients`), and whose KL on a few prompts is not clearly too large. None scores all.

    Raises:
        OrthogonalizeError: there are no directions.
    """
    places = places or Places.of(directions.positions, directions.layer_count)
    prompts: dict[Side, Ids] = {"positive": positive, "negative": negative}
    kept = MemoryStore() if known is None else known
    scores = _Scores(model, prompts, directions, readout, everywhere, kept)
    if model is not None and not all(_started(scores, finder, places, enough) for finder in finders):
        note(scores.forecast(finders, places, enough))
    if enough is None:
        result = _of_every_place(scores, finders, places)
    else:
        result = _of_the_best(scores, finders, places, enough)
    if not result:
        raise OrthogonalizeError("the two sides have the same activations everywhere, so no direction separates them")
    return result


def _started(scores: _Scores, finder: str, places: Places, enough: int | None) -> bool:
    """Whether the last layer that is gone through for `finder` first has been scored."""
    last = places.layers[-1]
    return (score_key(finder, last) if enough is None else estimate_key(finder, last)) in scores.known
