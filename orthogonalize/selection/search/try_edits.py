"""The search of `extract`: conditional edits first, then others, on val prompts; the best are confirmed by answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...architectures.schema import architecture_of
from ...checkpoints.checkpoint import Checkpoint
from ...core.interrupts import check
from ...core.journal import Journal
from ...core.progress import note, track
from ...directions.direction_set import Directions
from ..candidates import Candidate
from ..fits import Fits
from ..own_answers import ANSWER_TOKENS, Generate
from .drift import AnsweredPrompts
from .objectives import Trial
from .space import SearchSpace, build_from_directions, reads_can_be_baked
from .trials import EditSearch, confirm

NEGATIVE = "answers"  # the journal's name for the answers to negative prompts


@dataclass(frozen=True)
class ValPrompts:
    """The val prompts of a run, as token ids: both sides, and the preserved sets by source."""

    positive: Sequence[list[int]]
    negative: Sequence[list[int]]
    preserved: Mapping[str, Sequence[list[int]]]


class EditTrials:
    """Tries whole edits of a model on val prompts.

    `generate` answers prompts with the model as it is; `refusal_rate` gives the share of refusals in its answers to the
    positive val prompts.
    """

    def __init__(
        self,
        model: Any,
        source: Checkpoint,
        directions: Directions,
        ranked: Sequence[Candidate],
        tokens: Sequence[int],
        generate: Generate,
        journal: Journal,
    ) -> None:
        self.model, self.source, self.tokens = model, source, tokens
        self.directions, self.ranked = directions, ranked
        self.generate, self.journal = generate, journal

    def run(self, budget: int, prompts: ValPrompts, fits: Fits, refusal_rate: Callable[[], float]) -> list[Trial]:
        """Up to `budget` trials, the best first; none if the model answers nothing to the negative prompts."""
        answers = self._answered(NEGATIVE, prompts.negative)
        if answers is None:
            note("the model gives empty answers to the negative prompts, so no edits are tried")
            return []
        preserved = {name: self._answered(f"answers:{name}", ids) for name, ids in prompts.preserved.items()}
        search = EditSearch(
            self.model,
            build_from_directions(
                self.directions, self.ranked, fits=fits,
                layer_norm=architecture_of(self.source.config).norms.kind == "layer",
            ),
            self.tokens,
            prompts.positive,
            answers,
            {name: each for name, each in preserved.items() if each is not None},
            known=self.journal,
        )  # fmt: skip
        space = SearchSpace(self.directions, self.ranked, reads_can_be_baked(self.source, self.directions))
        fitted, plain = space.fitted_starts() if fits.possible else [], space.starts()
        starts = [*fitted[:1], *plain[:2], *fitted[1:], *plain[2:]]  # of each kind, whatever the budget
        found = search.search(budget, starts, space.neighbours, space.largest_step)
        return confirm(search, found, self.journal, refusal_rate)

    def _answered(self, name: str, ids: Sequence[list[int]]) -> AnsweredPrompts | None:
        """Prompts with the model's own answers, those with empty answers left out; None if nothing is left."""
        if name not in self.journal:
            with track("the model's own answers", len(ids), "prompts") as advance:
                self.journal.put({name: self.generate(list(ids), ANSWER_TOKENS, advance)})
            check()
        pairs = [(row, answer) for row, answer in zip(ids, self.journal[name], strict=True) if answer]
        if not pairs:
            return None
        return AnsweredPrompts(self.model, [row for row, _ in pairs], [answer for _, answer in pairs])
