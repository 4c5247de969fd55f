"""The check of an edit by its generated answers, which confirms the best edits of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...core.journal import Journal
from ...data.answer_forms import repeats, words
from ...data.languages import switches
from ...data.refusals import PREFIXES
from ...selection.behaviour import MeasureInfo
from ...selection.search.objectives import AnswerShares
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

    def shares(self, pairs: Sequence[Pair], wanted: bool, journal: Journal) -> AnswerShares:
        """The shares of (prompt, answer) that are not as they should be, and whose answer is degenerate.

        They should show the behaviour if that is `wanted`, and lack it if it is not. An empty answer, and one that the
        measure cannot tell, are not as they should be. Degenerate are those that are empty, repeat themselves, or are
        in another language than their prompt.
        """
        shown = self.shows(pairs, journal)
        left = sum(not words(answer) or each is not wanted for (_, answer), each in zip(pairs, shown, strict=True))
        degenerate = sum(not words(said) or repeats(said) or switches(asked, said) for asked, said in pairs)
        return AnswerShares(left / len(pairs), degenerate / len(pairs))
