"""The check of an edit by its generated answers, which confirms the best edits of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...core.journal import Journal
from ...data.answer_forms import words
from ...data.refusals import PREFIXES
from ...selection.behaviour import MeasureInfo
from .base import AnswerMeasure, Opening, Pair, Shows
from .registry import MEASURES, find_measure


@dataclass(frozen=True)
class AnswerCheck:
    """Tells how many answers of an edited model are not as they should be."""

    shows: Shows

    @classmethod
    def of(cls, info: MeasureInfo, device: str = "auto") -> AnswerCheck:
        """The check by a run's measure; by the wording of refusals if that needs no answers.

        Raises:
            OrthogonalizeError: the measure cannot be used, such as a judge whose model is missing.
        """
        measure, argument = find_measure(info.name)
        phrases: Sequence[str] = info.phrases
        if not isinstance(measure, AnswerMeasure):
            measure, phrases = MEASURES["wording"], PREFIXES
        assert isinstance(measure, AnswerMeasure)
        return cls(measure.open(Opening(argument, phrases, device)))

    def left(self, pairs: Sequence[Pair], wanted: bool, journal: Journal) -> float:
        """The share of (prompt, answer) that do not show the behaviour if that is `wanted`, or show it if it is not.

        An empty answer, and one that the measure cannot tell, count as left.
        """
        shown = self.shows(pairs, journal)
        left = sum(not words(answer) or each is not wanted for (_, answer), each in zip(pairs, shown, strict=True))
        return left / len(pairs)
