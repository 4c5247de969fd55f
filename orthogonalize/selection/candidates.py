"""Score, filter and rank every (finder, position, layer) as a place to edit.

Scores are stored, so the choice can be redone without the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import scipy
import torch

from ..core.errors import OrthogonalizeError
from ..core.interrupts import check
from ..core.interventions import AffineMap, centred_map, shift, stack_maps
from ..core.progress import track
from ..directions.direction_set import Directions
from ..directions.finders.registry import FINDERS
from ..models.hooks import Stream
from .scoring import LocalScorer, behaviour_score, divergence, global_probabilities

MAX_KL = 0.1  # nats; eliroc98/refusal_direction
MIN_INDUCE = 0.0  # log-odds
PRUNED_LAYERS = 0.2  # the share of last layers that is not eligible
MULTIPLIERS = (0.5, 1.0, 2.0)  # of the mean difference, when it is added


@dataclass(frozen=True)
class Candidate:
    """One (finder, position, layer) of a model of `layer_count` layers, and its scores.

    `bypass`: mean behaviour score (log-odds) of positive val prompts with all that the method found
    edited out at this layer; lower is better. `induce`: the same of negative prompts with the first
    direction added at this layer's input, at 0.5, 1 and 2 times the mean difference's norm: the median of
    the three. `kl`: mean first-token KL on negative prompts when edited out, nats. `global_bypass` and
    `global_kl`: the same with the edit at every write of the model, where that was asked for.
    `accuracy` is INLP's first classifier's. `failed` lists the filters it does not pass; `rank`
    counts from 0 over those of its finder that pass.
    """

    finder: str
    position: int
    layer: int
    layer_count: int
    bypass: float
    induce: float
    kl: float
    rank_of_basis: int = 1
    accuracy: float | None = None
    global_bypass: float | None = None
    global_kl: float | None = None
    failed: tuple[str, ...] = ()
    rank: int | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Candidate:
        """A candidate from an entry of candidates.json, which calls the finder `method`."""
        rest = {key: value for key, value in row.items() if key != "method"}
        return cls(row["method"], **{**rest, "failed": tuple(row.get("failed", ()))})

    def row(self) -> dict[str, Any]:
        """The entry of candidates.json."""
        named = asdict(self)
        return {"method": named.pop("finder"), **named}


def load_candidates(file: Path) -> list[Candidate]:
    """The candidates of a candidates.json.

    Raises:
        OrthogonalizeError: no such file, or it is damaged.
    """
    try:
        return [Candidate.from_row(row) for row in json.loads(file.read_text("utf-8"))["candidates"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OrthogonalizeError(f"{file} is no candidates.json of this version ({error})") from error


def rank(
    candidates: Sequence[Candidate] | Path | str,
    kl: float = MAX_KL,
    induce: float = MIN_INDUCE,
    prune: float = PRUNED_LAYERS,
) -> list[Candidate]:
    """Filter and rank by stored scores, no model needed: finder by finder, best first, failed ones last.

    Filters: a score that is not a number, KL over `kl`, induce under `induce`, and the last `prune`
    share of layers. Those that pass are ranked by bypass (lowest first). Those that fail follow, the
    least wrong first, so that the first of all is the best choice even where none passes.

    Args:
        candidates: a run's candidates, or the path of a candidates.json.
    """
    given = load_candidates(Path(candidates)) if isinstance(candidates, Path | str) else list(candidates)
    ranked: list[Candidate] = []
    for finder in dict.fromkeys(c.finder for c in given):
        judged = [replace(c, failed=_failed(c, kl, induce, prune), rank=None) for c in given if c.finder == finder]
        judged.sort(key=lambda c: _order(c, kl, induce))
        ranked += [c if c.failed else replace(c, rank=i) for i, c in enumerate(judged)]
    return ranked


def _failed(candidate: Candidate, kl: float, induce: float, prune: float) -> tuple[str, ...]:
    failed = []
    if not all(math.isfinite(x) for x in (candidate.bypass, candidate.induce, candidate.kl)):
        failed.append("not a number")
    if candidate.kl > kl:
        failed.append(f"kl {candidate.kl:.3g} > {kl:g}")
    if candidate.induce < induce:
        failed.append(f"induce {candidate.induce:.3g} < {induce:g}")
    if candidate.layer >= candidate.layer_count * (1 - prune):
        failed.append("late layer")
    return tuple(failed)


def _order(candidate: Candidate, kl: float, induce: float) -> tuple[float, ...]:
    """Those that pass by bypass; then those that fail, the least wrong first."""
    if not candidate.failed:
        return (0, candidate.bypass)
    if "not a number" in candidate.failed:
        return (3, candidate.layer)
    wrong = max(candidate.kl / kl - 1, 0) + max(induce - candidate.induce, 0)
    return (2 if "late layer" in candidate.failed else 1, candidate.bypass > 0, wrong)


def explain_fallback(ranked: Sequence[Candidate], finder: str) -> str | None:
    """Where no candidate of `finder` passes: how many each filter stops, and what the best of all fails by."""
    mine = [c for c in ranked if c.finder == finder]
    if not mine or not mine[0].failed:
        return None
    stops = [reason.split(" ")[0] for c in mine for reason in c.failed]
    names = {"not": "not a number", "late": "late layer"}
    counts = ", ".join(f"{names.get(s, s)} {stops.count(s)}" for s in dict.fromkeys(stops))
    best = mine[0]
    return (
        f"no {finder} direction passes the filters (of {len(mine)}, each stops: {counts}); the least wrong is "
        f"position {best.position}, layer {best.layer}, which fails {', '.join(best.failed)}"
    )


def layer_ranking(ranked: Sequence[Candidate], finder: str) -> list[int]:
    """Layers of `finder` from the best on, each by its best candidate."""
    return list(dict.fromkeys(c.layer for c in ranked if c.finder == finder))


def rank_correlation(candidates: Sequence[Candidate], finder: str) -> float | None:
    """Spearman's correlation of local and global bypass over the candidates of `finder`; None where unknown."""
    pairs = [(c.bypass, c.global_bypass) for c in candidates if c.finder == finder and c.global_bypass is not None]
    if len(pairs) < 3:
        return None
    found = float(scipy.stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    return found if math.isfinite(found) else None


class Scored(Protocol):
    """Where finished scores are looked up and new ones stored (a `core.journal.Journal`)."""

    def __contains__(self, key: str) -> bool: ...

    def __getitem__(self, key: str) -> Any: ...

    def put(self, results: Mapping[str, Any]) -> None: ...


class _Kept(dict[str, Any]):
    """Scores in memory only."""

    def put(self, results: Mapping[str, Any]) -> None:
        self.update(results)


@dataclass
class _Scoring:
    """What scoring needs at every layer."""

    model: Any
    positive: Sequence[Sequence[int]]
    negative: Sequence[Sequence[int]]
    directions: Directions
    tokens: Sequence[int]
    everywhere: bool

    def __post_init__(self) -> None:
        self.on_positive = LocalScorer(self.model, self.positive)
        self.on_negative = LocalScorer(self.model, self.negative)
        self.centring = Stream.of(self.model).architecture.norms.kind == "layer"  # as `edit` does
        width = self.directions.mean_diffs.shape[-1]
        self.base = self.on_negative.probabilities(0, shift(torch.zeros(1, width)), projected=False)[0]

    def layer(self, finder: str, layer: int, induced: MutableMapping[tuple[int, int], float]) -> list[Candidate]:
        """Score `finder` at every position of `layer`; `induced` holds what adding mean differences gave."""
        found = {p: self.directions.removal(finder, p, layer) for p in self.directions.positions}
        maps = {p: centred_map(m) if self.centring else m for p, m in found.items() if m is not None}
        if not maps:
            return []
        removals = stack_maps(list(maps.values()))
        bypassed = behaviour_score(self.on_positive.probabilities(layer, removals, projected=True), self.tokens)
        kept = self.on_negative.probabilities(layer, removals, projected=True)
        kl = divergence(self.base.expand_as(kept), kept).mean(-1)
        induce = self._induce(finder, layer, list(maps), induced)
        bypass_all, kl_all = self._everywhere(removals)
        result = []
        for i, position in enumerate(maps):
            result.append(
                Candidate(
                    finder,
                    position,
                    layer,
                    self.directions.layer_count,
                    bypassed.mean(-1)[i].item(),
                    induce[i],
                    kl[i].item(),
                    maps[position].rank,
                    FINDERS[finder].accuracy(self.directions, position, layer),
                    bypass_all[i] if bypass_all else None,
                    kl_all[i] if kl_all else None,
                )
            )
        return result

    def _induce(
        self, finder: str, layer: int, positions: list[int], induced: MutableMapping[tuple[int, int], float]
    ) -> list[float]:
        """Median over the multipliers of the mean score with the first direction added, a value a position."""
        shared = FINDERS[finder].adds_mean_difference  # which another finder may have scored
        if shared and all((p, layer) in induced for p in positions):
            return [induced[p, layer] for p in positions]
        shifts = []
        for position in positions:
            basis = self.directions.basis(finder, position, layer)
            assert basis is not None
            length = self.directions.mean_diff(position, layer).norm()
            shifts += [multiplier * length * basis[0] for multiplier in MULTIPLIERS]
        probabilities = self.on_negative.probabilities(layer, shift(torch.stack(shifts)), projected=False)
        means = behaviour_score(probabilities, self.tokens).mean(-1).reshape(len(positions), -1)
        values = [median(row) for row in means.tolist()]
        if shared:
            induced.update({(p, layer): v for p, v in zip(positions, values, strict=True)})
        return values

    def _everywhere(self, removals: AffineMap) -> tuple[list[float], list[float]]:
        if not self.everywhere:
            return [], []
        layers = self.directions.layer_count
        bypassed = global_probabilities(self.model, self.positive, removals, layers)
        kept = global_probabilities(self.model, self.negative, removals, layers)
        kl = divergence(self.base.expand_as(kept), kept).mean(-1)
        return behaviour_score(bypassed, self.tokens).mean(-1).tolist(), kl.tolist()


def score_candidates(
    model: Any,
    positive: Sequence[Sequence[int]],
    negative: Sequence[Sequence[int]],
    directions: Directions,
    finders: Sequence[str],
    tokens: Sequence[int],
    everywhere: bool = False,
    known: Scored | None = None,
) -> list[Candidate]:
    """Score every (finder, position, layer) on val prompts (token ids), editing at that layer only.

    Args:
        everywhere: score each edit at every write of the model as well (`global_bypass`, `global_kl`).
        known: where scores are kept as they come; those already there are not computed again.
    """
    kept = _Kept() if known is None else known
    scoring: _Scoring | None = None
    induced: dict[tuple[int, int], float] = {}
    result: list[Candidate] = []
    with track("scoring directions", directions.layer_count * len(finders), "layers") as advance:
        for layer in range(directions.layer_count):
            for finder in finders:
                key = f"candidates:{finder}:{layer}"
                if key not in kept:
                    scoring = scoring or _Scoring(model, positive, negative, directions, tokens, everywhere)
                    kept.put({key: [c.row() for c in scoring.layer(finder, layer, induced)]})
                    check()
                found = [Candidate.from_row(row) for row in kept[key]]
                if FINDERS[finder].adds_mean_difference:
                    induced.update({(c.position, c.layer): c.induce for c in found})
                result += found
                advance(1)
    if not result:
        raise OrthogonalizeError(
            "the two sides have the same activations everywhere, so there is no direction between them"
        )
    return result
