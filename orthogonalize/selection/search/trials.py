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

from ...core.errors import ran_out_of_memory
from ...core.interrupts import check
from ...core.interventions import Intervention
from ...core.journal import Journal
from ...core.progress import Progress, note, track
from ...edits.config import EditConfig
from ...edits.methods.registry import METHODS
from ...models.hooks import intervened
from ..candidates import ScoreStore
from ..readouts import FirstToken, Readout
from ..scoring import PromptScores
from .drift import AnsweredPrompts, Drift
from .objectives import AnswerShares, CheckAnswers, Trial, best, share_flipped, share_left
from .strengths import StrengthGradients, StrengthSteps

# Refining has halved the cost of an edit; one that costs more than this many times the best is not refined.
REACH = 4.0
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
        readout: scores the behaviour.
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
    readout: Readout
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
    def _target(self) -> PromptScores:
        return self._scores_of(self.target)

    @cached_property
    def _preserved(self) -> dict[str, PromptScores]:
        return {name: self._scores_of(answers.prompts) for name, answers in self.preserved.items()}

    def _scores_of(self, ids: Sequence[Sequence[int]]) -> PromptScores:
        return PromptScores(self.model, ids, self.readout, self.layer)

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
        self,
        budget: int,
        starts: Sequence[EditConfig],
        neighbours: Neighbours,
        largest_step: int = 1,
        strength_steps: int = 0,
    ) -> list[Trial]:
        """Try up to `budget` edits and return all of them, the best first, the others by their cost.

        Half of the budget, and at least two edits, are for the first of `starts`; the rest is a descent from the best
        edit to its `neighbours`, in steps that shrink from `largest_step` to 1. The last `strength_steps` edits of the
        budget give single sites strengths of their own, if there is an edit where that pays (see `strengths`). What is
        not worth a trial is not tried, so the budget may not be used up.
        """
        with track("trying edits", budget, "edits") as advance:
            for group in self._groups(starts[: min(budget, max(2, budget // 2))]):
                self.run_all([choice for choice in group if self._may_pay(choice)])
                advance(len(group))
            self._refine(budget - strength_steps, neighbours, largest_step, advance)
            if strength_steps:
                self._refine_strengths(strength_steps, advance)
                self._refine(budget, neighbours, largest_step, advance)
        first = best(list(self.tried.values()))
        return [first, *(t for t in self._by_cost() if t is not first)]

    def _may_pay(self, choice: EditConfig) -> bool:
        """Whether to try a start: one that is not fitted is skipped once two such cost far more than a fitted one."""
        fitted = {each: METHODS[each.method].fitted for each in (choice, *self.tried)}
        plain = [trial.cost for each, trial in self.tried.items() if not fitted[each]]
        other = [trial.cost for each, trial in self.tried.items() if fitted[each]]
        return fitted[choice] or len(plain) < 2 or not other or min(plain) <= REACH * min(other)

    def _groups(self, choices: Sequence[EditConfig]) -> list[Sequence[EditConfig]]:
        """`choices` in groups that are measured together."""
        return [choices[start : start + self.at_once] for start in range(0, len(choices), self.at_once)]

    def _by_cost(self) -> list[Trial]:
        return sorted(self.tried.values(), key=lambda t: t.order)

    def _refine(self, budget: int, neighbours: Neighbours, step: int, advance: Progress) -> None:
        """Coordinate descent: the first neighbour that becomes the best is the next to have its neighbours tried.

        It ends where nothing near the best is better, if that does what it should; otherwise it goes on from others.
        """
        while len(self.tried) < budget:
            current = best(list(self.tried.values()))
            fresh = [c for c in neighbours(current.choice, step) if c not in self.tried]
            if not fresh and step == 1:
                if not current.excess:
                    return
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

    def _refine_strengths(self, steps: int, advance: Progress) -> None:
        """Give the sites of the best plain edit strengths of their own, step by step.

        Edits that are fitted are left alone: for them, it gains nothing over one strength for all. So are all where
        first tokens do not tell of the behaviour: only they have gradients here.
        """
        start, readout = self._best_of_several_writes(), self.readout
        if start is None or not isinstance(readout, FirstToken):
            return
        gradients = StrengthGradients(self.model, self.build(start.choice).writes)
        sets = [(each.prompts, each.answers) for each in (self.answers, *self.preserved.values())]
        kept = start.score + readout.threshold
        found = StrengthSteps(gradients, self.target, readout.tokens, sets, self.shows, kept)
        strengths = [1.0] * len(gradients.sites)
        for step in range(steps):
            before = strengths
            try:
                strengths = self._kept(f"strengths:{step}:{start.choice.model_dump_json()}", found, before)
            except (MemoryError, RuntimeError) as error:
                if ran_out_of_memory(error) is None:
                    raise
                note("there is not enough memory for gradients, so sites do not get strengths of their own")
                return
            if strengths == before:
                return
            by_site = {str(site): each for site, each in zip(gradients.sites, strengths, strict=True)}
            self.run(EditConfig.model_validate({**start.choice.model_dump(), "site_strengths": by_site}))
            advance(1)

    def _kept(self, key: str, steps: StrengthSteps, strengths: list[float]) -> list[float]:
        """The strengths after a step from `strengths`, from the store if it knows them."""
        if self.known is None:
            return steps.after(strengths)
        if key not in self.known:
            self.known.put({key: steps.after(strengths)})
            check()
        return list(self.known[key])

    def _best_of_several_writes(self) -> Trial | None:
        """The best trial of an edit that is not fitted and acts on several write sites, and on nothing else.

        None if another edit costs so much less that strengths of sites cannot make up for it.
        """
        plain = []
        for trial in self.tried.values():
            method = METHODS[trial.choice.method]
            if not (method.fitted or method.adds or method.restores_mean(trial.choice)):
                edit = self.build(trial.choice)
                plain += [trial] if len(edit.writes) > 1 and not edit.reads else []
        found = best(plain) if plain else None
        return found if found and found.cost <= REACH * best(list(self.tried.values())).cost else None


def _key(choice: EditConfig) -> str:
    """The name of a trial in a store."""
    return f"trial:{choice.model_dump_json()}"


def confirm(trials: EditSearch, found: list[Trial], journal: Journal, left: CheckAnswers, most: int = 4) -> list[Trial]:
    """Check the best trials by generated answers; the first whose answers are as they should be moves to the front.

    `left` measures the share of the current model's answers to the target val prompts that are not as they should be.
    If that is not so of most answers of the unedited model, the check says nothing and the order stays as it is. How
    many answers are degenerate is only reported: of a model that answers in loops, an edit makes no other.
    """
    if "left" not in journal:
        journal.put({"left": left()})
        check()
    base = AnswerShares(*journal["left"])
    if base.left < 0.5:
        return found
    confirmed: list[Trial] = []
    for trial in found[:most]:
        key = f"confirmed:{trial.choice.model_dump_json()}"
        if key not in journal:
            with trials.edited(trial.choice):
                journal.put({key: left()})
            check()
        shares = AnswerShares(*journal[key])
        measured = {"confirmed": shares.left, "degenerate": shares.degenerate, "degenerate_before": base.degenerate}
        confirmed.append(trial.model_copy(update=measured))
        if shares.left <= CONFIRMED:
            break
    # Only the last can have passed; if none did, the one with the fewest failures comes first.
    confirmed.sort(key=lambda t: t.confirmed or 0.0)
    return [*confirmed, *found[len(confirmed) :]]
