"""Score directions with a model that is whole in memory: all of them, or cheaply first and fully only the best."""

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
    failed_filters,
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
from .meters import ResidentMeter

Ids = Sequence[Sequence[int]]
SCREENED = 4  # prompts a side by which directions are put into the order in which they are scored
CLEARLY = 3.0  # times the largest KL: a direction that moves the few prompts further cannot pass with all of them
MOST_SCORED = 3  # times `enough`: directions of a finder that are scored by all prompts, however few of them pass


def resident_scoring(meter: ResidentMeter, directions: Directions, everywhere: bool) -> DirectionScoring:
    """The scoring of directions with a model that is whole in memory; see `score_candidates`."""
    layer_norm = Stream.of(meter.model).architecture.norms.kind == "layer"
    return DirectionScoring(meter, directions, everywhere, layer_norm)


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

    def screened(self, finder: str, layer: int, positions: Sequence[int]) -> list[Candidate]:
        """Scores by few prompts and bypass alone."""
        return self._kept(f"screened:{finder}:{layer}", lambda: self.screening.bypass(finder, layer, positions))

    def moved(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Screened candidates of one finder and layer, with their KL by few prompts."""
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

    def estimate(self, finders: Sequence[str], places: Places, enough: int | None) -> str:
        """What will be scored, and about how long it takes: at least so long, if `enough` directions are looked for.

        An edit at layer l costs the blocks from l on; every direction is removed once for each side, and added to the
        negative prompts at every length.
        """
        layers, positive, negative = self.directions.layer_count, *map(len, self.prompts.values())
        depth = sum((layers - layer) / layers for layer in places.layers)
        count = len(finders) * len(places.positions)
        tokens = self.meter.tokens  # and this measures the time of a token
        one = tokens("positive", positive) + (1 + len(MULTIPLIERS)) * tokens("negative", negative)
        if enough is None:
            passes = count * depth * one
            what = f"scoring {count * len(places.layers)} directions by {positive} + {negative} prompts"
        else:
            few = min(SCREENED, positive)
            passes = count * depth * tokens("positive", few) + len(finders) * enough * one * depth / len(places.layers)
            best = f"scoring the best by {positive} + {negative}"
            what = f"screening {count * len(places.layers)} directions by {few} prompts, and {best}"
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
    """Scores in order of the bypass of few prompts, until `enough` directions of each finder pass the filters, or
    `MOST_SCORED` times as many are scored.
    """
    screened: dict[str, list[Candidate]] = {finder: [] for finder in finders}
    with track("screening directions", len(places.layers) * len(finders), "layers") as advance:
        for layer in places.layers:
            for finder in finders:
                screened[finder] += scores.screened(finder, layer, places.positions)
                advance(1)
    found: dict[str, list[Candidate]] = {}
    with track("scoring the best directions", enough * len(finders), "that pass") as advance:
        for finder, candidates in screened.items():
            found[finder] = _until_enough_pass(scores, finder, candidates, enough, advance)
    ranked = rank([c for each in found.values() for c in each])
    place = common_place(ranked) if ranked else None
    result: list[Candidate] = []
    for finder, candidates in screened.items():
        full = {(c.position, c.layer): c for c in found[finder] if c.induce is not None}
        if place in {(c.position, c.layer) for c in candidates} - full.keys():  # so that finders can be compared there
            position, layer = place
            (full[place],) = scores.scored(finder, layer, [position], part=True)
        broken = {(c.position, c.layer): c for c in found[finder] if c.induce is None}
        result += ({(c.position, c.layer): c for c in candidates} | broken | full).values()
    return result


def _until_enough_pass(
    scores: _Scores, finder: str, screened: Sequence[Candidate], enough: int, advance: Callable[[int], None]
) -> list[Candidate]:
    """The candidates that were scored by all prompts, and those whose KL by few is clearly too large for that.

    Directions without which the model is broken show no behaviour either: they come first in the order of bypass, and
    would each cost as much as a good one.
    """
    able = [c for c in screened if c.layer < first_pruned_layer(c.layer_count) and math.isfinite(c.bypass)]
    able.sort(key=lambda c: c.bypass)
    scored: list[Candidate] = []
    broken: list[Candidate] = []
    passing = 0
    for start in range(0, len(able), enough):
        portion = able[start : start + enough]
        for layer in sorted({c.layer for c in portion}):
            here = scores.moved(sorted((c for c in portion if c.layer == layer), key=lambda c: c.position))
            usable = [c for c in here if not (c.kl or 0.0) > CLEARLY * MAX_KL]
            broken += [c for c in here if c not in usable]
            if usable:
                scored += scores.scored(finder, layer, [c.position for c in usable], part=True)
        now = min(enough, sum(not failed_filters(c) for c in scored))
        advance(now - passing)
        passing = now
        if passing == enough or len(scored) >= MOST_SCORED * enough:
            break
    return [*scored, *broken]


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
        enough: how many directions of a finder that pass the filters are enough: all are scored by bypass on a few
            prompts; in the order of that, those whose KL on a few is not clearly too large are scored fully, until so
            many pass, or three times as many are scored. None scores all fully.

    Raises:
        OrthogonalizeError: there are no directions.
    """
    places = places or Places.of(directions.positions, directions.layer_count)
    prompts: dict[Side, Ids] = {"positive": positive, "negative": negative}
    kept = MemoryStore() if known is None else known
    scores = _Scores(model, prompts, directions, readout, everywhere, kept)
    if model is not None and not all(_started(scores, finder, places, enough) for finder in finders):
        note(scores.estimate(finders, places, enough))
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
    return (score_key(finder, last) if enough is None else f"screened:{finder}:{last}") in scores.known
