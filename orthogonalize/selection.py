"""Choosing where to edit: every (position, layer) is scored, filtered and ranked.

Scores are stored, so the choice can be redone without the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .directions import Directions
from .errors import OrthogonalizeError
from .interventions import AffineMap, removal, shift
from .progress import track
from .scores import LocalScorer, behaviour_score, divergence

MAX_KL = 0.1  # nats; eliroc98/refusal_direction
MIN_INDUCE = 0.0  # log-odds
PRUNED_LAYERS = 0.2  # the share of last layers that is not eligible


@dataclass(frozen=True)
class Candidate:
    """One (method, position, layer) and its local scores.

    `bypass`: mean behaviour score (log-odds) of positive val prompts with the direction edited out
    at this layer; lower is better. `induce`: the same of negative prompts with the mean difference
    added at this layer's input. `kl`: mean first-token KL on negative prompts when edited out, nats.
    `failed` lists the filters it does not pass; `rank` counts from 0 over those that pass.
    """

    method: str
    position: int
    layer: int
    bypass: float
    induce: float
    kl: float
    rank_of_basis: int = 1
    accuracy: float | None = None
    failed: tuple[str, ...] = ()
    rank: int | None = None


def rank(
    candidates: Sequence[Candidate],
    layer_count: int,
    kl: float = MAX_KL,
    induce: float = MIN_INDUCE,
    prune: float = PRUNED_LAYERS,
) -> list[Candidate]:
    """Filter and rank candidates of one method by stored scores; best first, failed ones last.

    Filters: a score that is not a number, KL over `kl`, induce under `induce`, and the last `prune`
    share of layers. Those that pass are ranked by bypass (lowest first). Those that fail follow, the
    least wrong first, so that the first of all is the best choice even where none passes.
    """
    judged = []
    for candidate in candidates:
        failed = []
        if not all(math.isfinite(x) for x in (candidate.bypass, candidate.induce, candidate.kl)):
            failed.append("not a number")
        if candidate.kl > kl:
            failed.append(f"kl {candidate.kl:.3g} > {kl:g}")
        if candidate.induce < induce:
            failed.append(f"induce {candidate.induce:.3g} < {induce:g}")
        if candidate.layer >= layer_count * (1 - prune):
            failed.append("late layer")
        judged.append(replace(candidate, failed=tuple(failed), rank=None))
    judged.sort(key=lambda c: _order(c, kl, induce))
    return [c if c.failed else replace(c, rank=i) for i, c in enumerate(judged)]


def _order(candidate: Candidate, kl: float, induce: float) -> tuple[float, ...]:
    """Those that pass by bypass; then those that fail, the least wrong first."""
    if not candidate.failed:
        return (0, candidate.bypass)
    if "not a number" in candidate.failed:
        return (3, candidate.layer)
    wrong = max(candidate.kl / kl - 1, 0) + max(induce - candidate.induce, 0)
    return (2 if "late layer" in candidate.failed else 1, candidate.bypass > 0, wrong)


def layer_ranking(ranked: Sequence[Candidate], method: str) -> list[int]:
    """Layers of `method` from the best on, each by its best candidate."""
    return list(dict.fromkeys(c.layer for c in ranked if c.method == method))


def _batched_maps(bases: list[torch.Tensor]) -> AffineMap:
    """One removal map a basis, stacked; shorter bases are filled up with zero directions."""
    most = max(len(b) for b in bases)
    filled = [torch.cat([b, b.new_zeros(most - len(b), b.shape[1])]) for b in bases]
    return removal(torch.stack(filled))


def score_candidates(
    model: Any,
    positive: Sequence[Sequence[int]],
    negative: Sequence[Sequence[int]],
    directions: Directions,
    methods: Sequence[str],
    tokens: Sequence[int],
    prune: float = PRUNED_LAYERS,
) -> list[Candidate]:
    """Score every (method, position, layer) on val prompts (token ids), editing at that layer only.

    The last `prune` share of layers is not eligible and is not scored.
    """
    layers = range(math.ceil(directions.layer_count * (1 - prune)))
    bypass_scorer, harmless_scorer = LocalScorer(model, positive), LocalScorer(model, negative)
    base = harmless_scorer.probabilities(0, shift(torch.zeros(1, directions.mean_diffs.shape[-1])), projected=False)[0]
    result: list[Candidate] = []
    with track("scoring directions", len(layers) * len(methods), "layers") as advance:
        for layer in layers:
            for method in methods:
                bases = {p: directions.basis(method, p, layer) for p in directions.positions}
                found = {p: b for p, b in bases.items() if b is not None}
                if found:
                    result += _score_layer(
                        layer, method, found, directions, bypass_scorer, harmless_scorer, base, tokens
                    )
                advance(1)
    if not result:
        raise OrthogonalizeError(
            "the two sides have the same activations everywhere, so there is no direction between them"
        )
    return result


def _score_layer(
    layer: int,
    method: str,
    bases: dict[int, torch.Tensor],
    directions: Directions,
    bypass_scorer: LocalScorer,
    harmless_scorer: LocalScorer,
    base: torch.Tensor,
    tokens: Sequence[int],
) -> list[Candidate]:
    removals = _batched_maps(list(bases.values()))
    # The mean difference's own norm along the first direction: for diff-in-means, itself.
    shifts = shift(torch.stack([directions.mean_diff(p, layer).norm() * b[0] for p, b in bases.items()]))
    bypassed = behaviour_score(bypass_scorer.probabilities(layer, removals, projected=True), tokens).mean(-1)
    kept = harmless_scorer.probabilities(layer, removals, projected=True)
    induced = behaviour_score(harmless_scorer.probabilities(layer, shifts, projected=False), tokens).mean(-1)
    kl = divergence(base.expand_as(kept), kept).mean(-1)
    result = []
    for i, (position, basis) in enumerate(bases.items()):
        subspace = directions.subspaces.get((position, layer)) if method == "inlp" else None
        result.append(
            Candidate(
                method,
                position,
                layer,
                bypassed[i].item(),
                induced[i].item(),
                kl[i].item(),
                len(basis),
                subspace.accuracies[0] if subspace else None,
            )
        )
    return result
