"""Score, filter and rank the directions of every (finder, position, layer).

Scores are stored, so that ranking again needs no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, Protocol

import scipy
from pydantic import TypeAdapter

from ..core.errors import OrthogonalizeError, first_line
from ..core.files import parse_json

MAX_KL = 0.1  # nats; eliroc98/refusal_direction
MIN_INDUCE = 0.0  # log-odds
PRUNED_LAYERS = 0.2  # fraction of the last layers, which are excluded (see `first_pruned_layer`)
UNSCORED = "estimated only"

Interval = tuple[float, float]


class Mean(NamedTuple):
    """A mean over prompts and its 95% t interval, which one prompt has not."""

    value: float
    ci95: Interval | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of the values."""
        mean, count = fmean(values), len(values)
        if count < 2 or not math.isfinite(mean):
            return cls(mean, None)
        half = float(scipy.stats.t.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count)
        return cls(mean, (mean - half, mean + half))


@dataclass(frozen=True)
class Candidate:
    """The direction of one (finder, position, layer) of a model with `layer_count` layers, and its scores.

    Attributes:
        bypass: mean score (see `Readout`) of positive val prompts with the direction removed at this layer; lower is
            better. Where `induce` is None, an estimate by few prompts: to first order, where the model has gradients.
        induce: the same of negative val prompts with the direction added at this layer's input; the median over 0.5, 1
            and 2 times the norm of the mean difference. None if enough directions look better, or its KL is clearly too
            large.
        kl: mean smoothed KL of the first token (`smoothed_kl`), in nats, on negative val prompts with the direction
            removed; of the first few prompts where `induce` is None, and None if enough others look better.
        bypass_ci95, induce_ci95, kl_ci95: the 95% t interval of each mean over its prompts (for `induce`, at the length
            of the median); None with one prompt. Finders are scored by the same prompts.
        rank_of_basis: the number of directions that are removed.
        accuracy: of INLP's first classifier.
        global_bypass, global_kl: `bypass` and `kl` with the edit at every write of the model; None if not scored.
        failed: the filters that it fails.
        rank: its place, from 0, among the candidates of its finder that pass; None if it fails.
    """

    finder: str
    position: int
    layer: int
    layer_count: int
    bypass: float
    induce: float | None
    kl: float | None
    rank_of_basis: int = 1
    accuracy: float | None = None
    global_bypass: float | None = None
    global_kl: float | None = None
    failed: tuple[str, ...] = ()
    rank: int | None = None
    bypass_ci95: Interval | None = None
    induce_ci95: Interval | None = None
    kl_ci95: Interval | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Candidate:
        """The candidate of an entry of candidates.json, in which the finder is called `method`.

        Raises:
            ValueError: it is not one.
        """
        return _CANDIDATE.validate_python({"finder" if key == "method" else key: value for key, value in row.items()})

    def row(self) -> dict[str, Any]:
        """The entry for candidates.json."""
        named = asdict(self)
        return {"method": named.pop("finder"), **named}


_CANDIDATE = TypeAdapter(Candidate)


def load_candidates(file: Path) -> list[Candidate]:
    """Read the candidates of a candidates.json.

    Raises:
        OrthogonalizeError: the file is missing or damaged.
    """
    try:
        return [Candidate.from_row(row) for row in parse_json(file.read_text("utf-8"))["candidates"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise OrthogonalizeError(f"{file} is not a candidates.json that this version can read ({reason})") from error


def rank(
    candidates: Sequence[Candidate] | Path | str,
    kl: float = MAX_KL,
    induce: float = MIN_INDUCE,
    prune: float = PRUNED_LAYERS,
) -> list[Candidate]:
    """Filter and rank candidates by their stored scores, finder by finder, best first.

    A candidate fails if a score is not a number, its KL is above `kl`, its induce score is below `induce`, it is in the
    last `prune` of the layers, or it was only estimated. Candidates that pass are ranked by bypass, lowest first. Those
    that fail follow: those that were only estimated, by that; then the others, the closest to passing first. If none
    passes, these come before those that were only estimated, so that the first candidate is the best choice.

    Args:
        candidates: the candidates of a run, or the path of a candidates.json.
        kl: maximum KL, in nats.
        induce: minimum induce score, in log-odds.
        prune: fraction of the last layers to exclude.

    Raises:
        OrthogonalizeError: a filter is not a finite number, or negative; or the file cannot be read.
    """
    if not (kl >= 0 and math.isfinite(kl) and math.isfinite(induce) and 0 <= prune <= 1):
        raise OrthogonalizeError(
            f"a filter is not usable: kl ({kl:g}) must be 0 or more, induce ({induce:g}) a number, prune ({prune:g}) "
            "between 0 and 1"
        )
    given = load_candidates(Path(candidates)) if isinstance(candidates, Path | str) else list(candidates)
    ranked: list[Candidate] = []
    for finder in dict.fromkeys(c.finder for c in given):
        judged = [
            replace(c, failed=failed_filters(c, kl, induce, prune), rank=None) for c in given if c.finder == finder
        ]
        judged.sort(key=partial(_order, kl=kl, induce=induce, some_pass=any(not c.failed for c in judged)))
        ranked += [c if c.failed else replace(c, rank=i) for i, c in enumerate(judged)]
    return ranked


def first_pruned_layer(layer_count: int, prune: float = PRUNED_LAYERS) -> int:
    """The first of the last layers that the filter excludes, rounded down as in eliroc98/refusal_direction."""
    return int(layer_count * (1 - prune))


def failed_filters(
    candidate: Candidate, kl: float = MAX_KL, induce: float = MIN_INDUCE, prune: float = PRUNED_LAYERS
) -> tuple[str, ...]:
    """The filters of `rank` that a candidate fails."""
    failed = []
    scores = (candidate.bypass, candidate.induce, candidate.kl)
    if not all(math.isfinite(x) for x in scores if x is not None):
        failed.append("not a number")
    if candidate.kl is not None and candidate.kl > kl:
        failed.append(f"kl {candidate.kl:.3g} > {kl:g}")
    if candidate.induce is not None and candidate.induce < induce:
        failed.append(f"induce {candidate.induce:.3g} < {induce:g}")
    if candidate.layer >= first_pruned_layer(candidate.layer_count, prune):
        failed.append("late layer")
    elif candidate.induce is None and not (candidate.kl is not None and candidate.kl > kl):
        failed.append(UNSCORED)
    return tuple(failed)


def _order(candidate: Candidate, kl: float, induce: float, some_pass: bool) -> tuple[float, ...]:
    """Sort key: those that pass, by bypass; then those that fail (see `rank`)."""
    if not candidate.failed:
        return (0, candidate.bypass)
    if "not a number" in candidate.failed:
        return (4, candidate.layer)
    if candidate.kl is None or UNSCORED in candidate.failed:
        return (3 if "late layer" in candidate.failed else 1 if some_pass else 2.5, candidate.bypass)
    over = candidate.kl / kl - 1 if kl else candidate.kl
    excess = max(over, 0) + max(induce - candidate.induce, 0) if candidate.induce is not None else math.inf
    return (3 if "late layer" in candidate.failed else 2, candidate.bypass > 0, excess, candidate.kl)


def explain_fallback(ranked: Sequence[Candidate], finder: str) -> str | None:
    """Why no candidate of `finder` passes: how many fail each filter, and how the closest fails; None if one passes."""
    mine = [c for c in ranked if c.finder == finder]
    if not mine or not mine[0].failed:
        return None
    stops = [reason.split(" ")[0] for c in mine for reason in c.failed]
    names = {"not": "not a number", "late": "late layer", "estimated": UNSCORED}
    counts = ", ".join(f"{names.get(s, s)} {stops.count(s)}" for s in dict.fromkeys(stops))
    best = mine[0]
    return (
        f"no {finder} direction passes the filters ({len(mine)} tried; failed: {counts}); the closest is "
        f"position {best.position}, layer {best.layer}, which fails {', '.join(best.failed)}"
    )


def explain_ranking(ranked: Sequence[Candidate], finders: Sequence[str]) -> list[str]:
    """What is to be said of a ranking: finders of which none passes, and how local and global scores agree."""
    lines = []
    for finder in finders:
        fallback, correlation = explain_fallback(ranked, finder), rank_correlation(ranked, finder)
        lines += [fallback] if fallback else []
        if correlation is not None:
            lines.append(f"{finder}: Spearman correlation of local and global scores {correlation:.2f}")
    return lines


def layer_ranking(ranked: Sequence[Candidate], finder: str) -> list[int]:
    """The layers of `finder`, best first, each ranked by its best candidate."""
    return list(dict.fromkeys(c.layer for c in ranked if c.finder == finder))


def best_by_finder(ranked: Sequence[Candidate]) -> dict[str, Candidate]:
    """The best candidate of each finder."""
    return {c.finder: c for c in reversed(ranked)}


def common_place(ranked: Sequence[Candidate]) -> tuple[int, int]:
    """The position and layer at which finders are compared like for like: those of the first finder's best."""
    return ranked[0].position, ranked[0].layer


def rank_correlation(candidates: Sequence[Candidate], finder: str) -> float | None:
    """Spearman's correlation of local and global bypass over the candidates of `finder`; None if unknown."""
    pairs = [(c.bypass, c.global_bypass) for c in candidates if c.finder == finder and c.global_bypass is not None]
    if len(pairs) < 3:
        return None
    found = float(scipy.stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    return found if math.isfinite(found) else None


class ScoreStore(Protocol):
    """A store of finished scores, such as a `core.journal.Journal`."""

    def __contains__(self, key: str) -> bool: ...

    def __getitem__(self, key: str) -> Any: ...

    def put(self, results: Mapping[str, Any]) -> None: ...


class MemoryStore(dict[str, Any]):
    """Scores in memory only."""

    def put(self, results: Mapping[str, Any]) -> None:
        self.update(results)
