"""Search over whole edits, tried with hooks: how much of the behaviour is left, and how far other answers move.

Scores at one layer rank directions, but do not tell which scope and strength remove a behaviour at the least cost. So
edits are tried on val prompts, and the best are refined one setting at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ...core.interrupts import check
from ...core.interventions import Intervention
from ...core.journal import Journal
from ...core.progress import Progress, track
from ...edits.config import EditConfig
from ...models.hooks import intervened
from ..candidates import ScoreStore
from ..scoring import FirstTokenScores
from .drift import AnsweredPrompts, Drift
from .objectives import Trial, best, share_flipped, share_left

CONFIRMED = 0.05  # largest share left among the answers of a confirmed edit

Build = Callable[[EditConfig], Intervention]
"""Makes the intervention of an edit."""

Neighbours = Callable[[EditConfig, int], list[EditConfig]]
"""The edits near an edit, at a step that is a number of layers."""


@dataclass
class EditSearch:
    """A search over edits on val prompts.

    Attributes:
        build: makes the intervention of an edit (see `EditBuilder`).
        tokens: the behaviour's first tokens.
        target: prompts whose behaviour the edit is to change, as token ids.
        answers: the base model's answers to the negative prompts.
        preserved: its answers to further prompts on which it should not change, by the name of their set.
        known: a store for trials; those that it contains are not repeated.
        examples: prompts that show the behaviour, if the target should show it, too; None: it should not, as those of
            `answers` do not.
        layer: the block at which the model starts under edits that spare its input.
    """

    model: Any
    build: Build
    tokens: Sequence[int]
    target: Sequence[Sequence[int]]
    answers: AnsweredPrompts
    preserved: Mapping[str, AnsweredPrompts] = field(default_factory=dict)
    known: ScoreStore | None = None
    examples: Sequence[Sequence[int]] | None = None
    layer: int = 0
    tried: dict[EditConfig, Trial] = field(default_factory=dict, init=False)

    @property
    def shows(self) -> bool:
        """Whether the target should show the behaviour after the edit."""
        return self.examples is not None

    @cached_property
    def _target(self) -> FirstTokenScores:
        return self._scores_of(self.target)

    @cached_property
    def _preserved(self) -> dict[str, FirstTokenScores]:
        return {name: self._scores_of(answers.prompts) for name, answers in self.preserved.items()}

    def _scores_of(self, ids: Sequence[Sequence[int]]) -> FirstTokenScores:
        return FirstTokenScores(self.model, ids, self.tokens, self.layer)

    def _left(self, scores: torch.Tensor) -> float:
        return share_left(-scores if self.shows else scores)

    @cached_property
    def before(self) -> float:
        """The share of target prompts that is left to be changed in the base model."""
        return self._left(self._target.base)

    @cached_property
    def usual(self) -> float:
        """The same of the examples, which are as the target should be."""
        return self._left(self._scores_of(self.answers.prompts if self.examples is None else self.examples).base)

    def edited(self, choice: EditConfig) -> AbstractContextManager[Any]:
        """Apply an edit to the model by hooks that act exactly as the baked weights would."""
        return intervened(self.model, self.build(choice), renormalise=False)

    @property
    def at_once(self) -> int:
        """The number of edits that are measured together."""
        return 1

    def run(self, choice: EditConfig) -> Trial:
        """Try an edit; repeated calls return the first result."""
        return self.run_all([choice])[0]

    def run_all(self, choices: Sequence[EditConfig]) -> list[Trial]:
        """Try several edits (see `run`)."""
        if self.known is not None:
            keys = {choice: _key(choice) for choice in choices if choice not in self.tried}
            self.tried |= {c: Trial.model_validate(self.known[key]) for c, key in keys.items() if key in self.known}
        fresh = [choice for choice in choices if choice not in self.tried]
        if fresh:
            self.tried |= dict(zip(fresh, self._measure_all(fresh), strict=True))
            if self.known is not None:
                self.known.put({_key(choice): self.tried[choice].model_dump() for choice in fresh})
            check()
        return [self.tried[choice] for choice in choices]

    def _measure_all(self, choices: Sequence[EditConfig]) -> list[Trial]:
        return [self._measure(choice) for choice in choices]

    def _measure(self, choice: EditConfig) -> Trial:
        intervention = self.build(choice)
        spared = intervention.spares(self.layer)

        def edited() -> AbstractContextManager[Any]:
            return intervened(self.model, intervention, renormalise=False)

        return self._trial(
            choice,
            self._target.edited(edited, spared),
            self.answers.drift(edited, spared),
            {name: answers.drift(edited, spared) for name, answers in self.preserved.items()},
            {name: share_flipped(each.base, each.edited(edited, spared)) for name, each in self._preserved.items()},
        )

    def _trial(
        self,
        choice: EditConfig,
        scores: torch.Tensor,
        drift: Drift,
        preserved: Mapping[str, Drift],
        flipped: Mapping[str, float],
    ) -> Trial:
        """The trial of an edit with these scores of the target prompts."""
        return Trial(
            choice=choice,
            left=self._left(scores),
            before=self.before,
            usual=self.usual,
            score=scores.mean().item(),
            kl=drift.kl,
            first_kl=drift.first_kl,
            ce_increase=drift.ce_increase,
            preserved={name: found.kl for name, found in preserved.items()},
            flipped=dict(flipped),
            kls={"": drift.kls} | {name: found.kls for name, found in preserved.items()},
        )

    def search(
        self, budget: int, starts: Sequence[EditConfig], neighbours: Neighbours, largest_step: int = 1
    ) -> list[Trial]:
        """Try up to `budget` edits and return all of them, the best first, the others by their cost.

        Half of the budget, and at least two edits, are for the first of `starts`; the rest is a descent from the best
        edit to its `neighbours`, in steps that shrink from `largest_step` to 1.
        """
        with track("trying edits", budget, "edits") as advance:
            for group in self._groups(starts[: min(budget, max(2, budget // 2))]):
                self.run_all(group)
                advance(len(group))
            self._refine(budget, neighbours, largest_step, advance)
        first = best(list(self.tried.values()))
        return [first, *(t for t in self._by_cost() if t is not first)]

    def _groups(self, choices: Sequence[EditConfig]) -> list[Sequence[EditConfig]]:
        """`choices` in groups that are measured together."""
        return [choices[start : start + self.at_once] for start in range(0, len(choices), self.at_once)]

    def _by_cost(self) -> list[Trial]:
        return sorted(self.tried.values(), key=lambda t: t.order)

    def _refine(self, budget: int, neighbours: Neighbours, step: int, advance: Progress) -> None:
        """Coordinate descent: the first neighbour that becomes the best is the next to have its neighbours tried."""
        while len(self.tried) < budget:
            current = best(list(self.tried.values()))
            fresh = [c for c in neighbours(current.choice, step) if c not in self.tried]
            if not fresh and step == 1:
                runners_up = [t for t in self._by_cost() if t is not current][:3]
                fresh = [c for t in runners_up for c in neighbours(t.choice, step) if c not in self.tried]
                if not fresh:
                    return
            if not fresh:
                step = max(1, step // 2)
                continue
            for group in self._groups(fresh[: budget - len(self.tried)]):
                self.run_all(group)
                advance(len(group))
                if best(list(self.tried.values())) is not current:
                    break


def _key(choice: EditConfig) -> str:
    """The name of a trial in a store."""
    return f"trial:{choice.model_dump_json()}"


def confirm(
    trials: EditSearch, found: list[Trial], journal: Journal, left: Callable[[], float], most: int = 4
) -> list[Trial]:
    """Check the best trials by generated answers; the first whose answers are as they should be moves to the front.

    `left` measures the share of the current model's answers to the target val prompts that are not as they should be.
    If that is not so of most answers of the unedited model, the check says nothing and the order stays as it is.
    """
    if "left" not in journal:
        journal.put({"left": left()})
        check()
    if journal["left"] < 0.5:
        return found
    confirmed: list[Trial] = []
    for trial in found[:most]:
        key = f"confirmed:{trial.choice.model_dump_json()}"
        if key not in journal:
            with trials.edited(trial.choice):
                journal.put({key: left()})
            check()
        confirmed.append(trial.model_copy(update={"confirmed": journal[key]}))
        if journal[key] <= CONFIRMED:
            break
    # Only the last can have passed; if none did, the one with the fewest failures comes first.
    confirmed.sort(key=lambda t: t.confirmed or 0.0)
    return [*confirmed, *found[len(confirmed) :]]
