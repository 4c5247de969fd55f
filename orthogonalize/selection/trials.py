"""Search over whole edits, tried with hooks: how much of the behaviour is left, and how much harm the edit does.

Scores at one layer rank directions, but do not tell which scope and strength remove a behaviour with the least harm. So
edits are tried on val prompts, and the best are refined one setting at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from ..architectures.schema import architecture_of
from ..checkpoints.checkpoint import Checkpoint
from ..core.errors import OrthogonalizeError
from ..core.interrupts import check
from ..core.journal import Journal
from ..core.progress import track
from ..directions.direction_set import Directions
from ..edits.bake import bake
from ..edits.build import finder_of, intervention_from_directions
from ..edits.config import EditConfig
from ..edits.methods.registry import DEFAULT
from ..edits.scopes import parse_scope
from ..models.hooks import intervened
from ..models.stream import Stream
from .candidates import Candidate, ScoreStore, layer_ranking
from .scoring import behaviour_score, completion_loss, first_token_probabilities

# An edit removes the behaviour if at most this share of positive prompts still shows it. It is small, since real scores
# have heavier tails than the normal distribution of `share_left`.
LEFT = 0.01
CONFIRMED = 0.05  # largest share of refusals among the answers of a confirmed edit


class Trial(BaseModel):
    """One edit tried on val prompts.

    Attributes:
        left: share of positive prompts that still show the behaviour (see `share_left`).
        score: mean behaviour score (log-odds) of the positive prompts.
        harm: relative increase of the cross-entropy of the base model's own answers to negative prompts (0.1 is 10%).
        confirmed: share of positive prompts whose generated answer still shows the behaviour; None if not checked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    choice: EditConfig
    left: float
    score: float
    harm: float
    confirmed: float | None = None

    @property
    def order(self) -> tuple[float, float]:
        """Sort key, best first: edits that remove the behaviour, by harm; then the others, by what is left."""
        return (0.0, self.harm) if self.left <= LEFT else (self.left, self.score)


def share_left(scores: torch.Tensor) -> float:
    """The share of prompts whose behaviour score (log-odds) is above 0.

    This is the observed share, or that of a normal distribution with the mean and standard deviation of the scores,
    whichever is larger: a few val prompts just below 0 do not show that a hundred others are.
    """
    observed = (scores > 0).double().mean().item()
    deviation = scores.double().std(correction=0).item() or 1e-9
    return max(observed, 0.5 * math.erfc(-scores.mean().item() / deviation / math.sqrt(2)))


@dataclass
class EditSearch:
    """A search over edits on val prompts.

    Attributes:
        positive, negative: prompts, as token ids.
        answers: the base model's answers to the negative prompts, as token ids.
        known: a store for trials; those that it contains are not repeated.
    """

    model: Any
    directions: Directions
    ranked: Sequence[Candidate]
    tokens: Sequence[int]
    positive: Sequence[Sequence[int]]
    negative: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    known: ScoreStore | None = None
    reads: bool = True  # whether edits of what is read (scope `from:`) can be written into this model

    def __post_init__(self) -> None:
        self.base_loss = completion_loss(self.model, self.negative, self.answers)
        self.tried: dict[EditConfig, Trial] = {}

    def edited(self, choice: EditConfig) -> AbstractContextManager[Any]:
        """Apply an edit to the model by hooks that act exactly as the baked weights would."""
        ranking = layer_ranking(self.ranked, finder_of(choice.method, self.directions))
        layer_norm = Stream.of(self.model).architecture.norms.kind == "layer"
        intervention = intervention_from_directions(choice, self.directions, ranking, layer_norm=layer_norm)
        return intervened(self.model, intervention, renormalise=False)

    def run(self, choice: EditConfig) -> Trial:
        """Try an edit; repeated calls return the first result."""
        if choice in self.tried:
            return self.tried[choice]
        key = f"trial:{choice.model_dump_json()}"
        if self.known is not None and key in self.known:
            self.tried[choice] = Trial.model_validate(self.known[key])
            return self.tried[choice]
        with self.edited(choice):
            probabilities = first_token_probabilities(self.model, self.positive)
            loss = completion_loss(self.model, self.negative, self.answers)
        scores = behaviour_score(probabilities, self.tokens)
        self.tried[choice] = Trial(
            choice=choice,
            left=share_left(scores),
            score=scores.mean().item(),
            harm=loss / self.base_loss - 1,
        )
        if self.known is not None:
            self.known.put({key: self.tried[choice].model_dump()})
            check()
        return self.tried[choice]

    def search(self, budget: int, methods: Iterable[str] = (DEFAULT,)) -> list[Trial]:
        """Try up to `budget` edits and return all of them, best first."""
        starts = [choice for method in methods for choice in self._starts(method)][: max(1, budget // 2)]
        with track("trying edits", budget, "edits") as advance:
            for choice in starts:
                self.run(choice)
                advance(1)
            self._refine(budget, advance)
        return sorted(self.tried.values(), key=lambda t: t.order)

    def _starts(self, method: str) -> list[EditConfig]:
        """The first edits to try: shared and per-layer directions of the best candidates, over spans of layers."""
        count = self.directions.layer_count
        finder = finder_of(method, self.directions)
        good = [c for c in self.ranked if c.finder == finder and not c.failed]
        good = good or [c for c in self.ranked if c.finder == finder]
        position = good[0].position
        shared = list({c.layer: c for c in reversed(good[:10])}.values())[-2:]
        spans = [f"from:{count * share // 10}" for share in (9, 8, 7)] if self.reads else []
        spans += [f"layers:{count // 2}-{count - 1}", f"layers:{count // 3}-{count * 4 // 5}"]
        choices: list[EditConfig] = []
        for scope in spans:
            choices.append(EditConfig(method=method, scope=scope, position=position, per_layer=True))
            choices += [EditConfig(method=method, scope=scope, position=c.position, layer=c.layer) for c in shared]
        return choices

    def _refine(self, budget: int, advance: Callable[[int], None]) -> None:
        """Coordinate descent from the best trials over span, strength, position and source layer."""
        step = max(1, self.directions.layer_count // 6)
        while len(self.tried) < budget:
            best = min(self.tried.values(), key=lambda t: t.order)
            fresh = [c for c in self._neighbours(best.choice, step) if c not in self.tried]
            if not fresh and step == 1:
                runner_up = sorted(self.tried.values(), key=lambda t: t.order)[1:4]
                fresh = [c for t in runner_up for c in self._neighbours(t.choice, step) if c not in self.tried]
                if not fresh:
                    return
            if not fresh:
                step = max(1, step // 2)
                continue
            for choice in fresh:
                if len(self.tried) >= budget:
                    return
                trial = self.run(choice)
                advance(1)
                if trial.order < best.order:
                    break  # continue from the new best

    def _neighbours(self, choice: EditConfig, step: int) -> list[EditConfig]:
        count = self.directions.layer_count
        near: list[EditConfig] = []
        scope = parse_scope(choice.scope)
        if scope.kind == "layers":
            first, last = scope.layers[0], scope.layers[-1]
            spans = [(first + step, last), (first, last - step), (first - step, last), (first, last + step)]
            near += [
                choice.model_copy(update={"scope": f"layers:{a}-{b}" if a < b else f"layers:{a}"})
                for a, b in spans
                if 0 <= a <= b < count
            ]
        if scope.kind == "from":
            starts = (scope.layers[0] + step, scope.layers[0] - step)
            near += [choice.model_copy(update={"scope": f"from:{start}"}) for start in starts if 0 < start <= count]
        near += [
            choice.model_copy(update={"strength": round(choice.strength + change, 2)})
            for change in (-0.2, 0.2, -0.1, 0.1)
            if 0.2 <= choice.strength + change <= 1.6
        ]
        positions = self.directions.positions
        near += [choice.model_copy(update={"position": p}) for p in positions if abs(p - (choice.position or 0)) == 1]
        if choice.layer is not None and not choice.per_layer:
            near += [
                choice.model_copy(update={"layer": choice.layer + change})
                for change in (-1, 1)
                if 1 <= choice.layer + change < count
            ]
        return near


def reads_can_be_baked(source: Checkpoint, directions: Directions) -> bool:
    """Whether edits of what is read (scope `from:`) can be written into the weights of `source`.

    Some families cannot take them: their heads stay tied, or read a norm's bias and have none to keep it by.
    """
    position, layer = directions.positions[-1], directions.layer_count
    choice = EditConfig(method=DEFAULT, scope=f"from:{layer - 1}", position=position, layer=layer)
    layer_norm = architecture_of(source.config).norms.kind == "layer"
    try:
        bake(source, intervention_from_directions(choice, directions, layer_norm=layer_norm))
    except OrthogonalizeError:
        return False
    return True


def confirm(
    trials: EditSearch, found: list[Trial], journal: Journal, refusal_rate: Callable[[], float], most: int = 4
) -> list[Trial]:
    """Check the best trials by generated answers; the first whose answers do not refuse moves to the front.

    `refusal_rate` measures the share of refusals among the current model's answers to the positive val prompts. If the
    unedited model does not refuse these by wording, the check says nothing and the order stays as it is.
    """
    if "refuses" not in journal:
        journal.put({"refuses": refusal_rate()})
        check()
    if journal["refuses"] < 0.5:
        return found
    confirmed: list[Trial] = []
    for trial in found[:most]:
        key = f"confirmed:{trial.choice.model_dump_json()}"
        if key not in journal:
            with trials.edited(trial.choice):
                journal.put({key: refusal_rate()})
            check()
        confirmed.append(trial.model_copy(update={"confirmed": journal[key]}))
        if journal[key] <= CONFIRMED:
            break
    # Only the last can have passed; if none did, the one with the fewest refusals comes first.
    confirmed.sort(key=lambda t: t.confirmed or 0.0)
    return [*confirmed, *found[len(confirmed) :]]
