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
from ...data.chat import ChatFormat
from ...data.prompts import PreservedPrompt, Prompt, Side, target_side, texts_of
from ...directions.direction_set import Directions
from ..builder import EditBuilder
from ..candidates import Candidate
from ..fits import Fits
from ..own_answers import ANSWER_TOKENS, Generate
from ..readouts import Readout
from .drift import AnsweredPrompts
from .objectives import CheckAnswers, Trial
from .space import SearchSpace, reads_can_be_baked
from .strengths import STEPS
from .trials import EditSearch, confirm

REFINED = 16  # trials from which on some go into the strengths of single sites
NEGATIVE = "answers"  # the journal's name for the answers to negative prompts

Answered = tuple[list[list[int]], list[list[int]]]
"""Prompts and the model's own answers to them, as token ids."""


@dataclass(frozen=True)
class ValPrompts:
    """The val prompts of a run, as token ids.

    `target` are those whose behaviour is to change; `examples` show it, if the target should show it too. `preserved`
    is by source.
    """

    target: Sequence[list[int]]
    negative: Sequence[list[int]]
    preserved: Mapping[str, Sequence[list[int]]]
    target_texts: Sequence[str]
    examples: Sequence[list[int]] | None = None

    @classmethod
    def of(
        cls, chat: ChatFormat, prompts: Sequence[Prompt], kept: Sequence[PreservedPrompt], most: int, strengthen: bool
    ) -> ValPrompts:
        """The val prompts of a run: at most `most` negative ones, and of each source of those that are to be `kept`."""

        def ids(side: Side) -> list[list[int]]:
            return chat.encode_all(texts_of(prompts, side, "val"))

        preserved = {
            name: [p.text for p in kept if (p.source, p.split) == (name, "val")][:most]
            for name in dict.fromkeys(p.source for p in kept)
        }
        return cls(
            ids(target_side(prompts)),
            ids("negative")[:most],
            {name: chat.encode_all(texts) for name, texts in preserved.items()},
            texts_of(prompts, target_side(prompts), "val"),
            ids("positive") if strengthen else None,
        )


class EditTrials:
    """Tries whole edits of a model on val prompts.

    `generate` answers prompts with the model as it is.
    """

    def __init__(
        self,
        model: Any,
        source: Checkpoint,
        directions: Directions,
        ranked: Sequence[Candidate],
        readout: Readout,
        generate: Generate,
        journal: Journal,
    ) -> None:
        self.model, self.source, self.readout = model, source, readout
        self.directions, self.ranked = directions, ranked
        self.generate, self.journal = generate, journal

    def run(self, budget: int, prompts: ValPrompts, fits: Fits, left: CheckAnswers) -> list[Trial]:
        """Up to `budget` trials, the best first.

        `left` gives the share of the model's answers to the target val prompts that are not as they should be. There
        are no trials if the model answers nothing to the negative prompts.
        """
        answers = self._answered(NEGATIVE, prompts.negative)
        if answers is None:
            note("the model gives empty answers to the negative prompts, so no edits are tried")
            return []
        found = {name: self._answered(f"answers:{name}", ids) for name, ids in prompts.preserved.items()}
        preserved = {name: each for name, each in found.items() if each is not None}
        layer_norm = architecture_of(self.source.config).norms.kind == "layer"
        builder = EditBuilder(self.directions, self.ranked, layer_norm, fits)
        search = self._open_search(builder, prompts, answers, preserved)
        reads = reads_can_be_baked(self.source, self.directions)
        space = SearchSpace(self.directions, self.ranked, reads, strengthen=search.shows, components=fits.components)
        fitted, plain = space.fitted_starts() if fits.possible else [], space.starts()
        starts = [*fitted[:1], *plain[:2], *fitted[1:], *plain[2:]]  # of each kind, whatever the budget
        steps = STEPS if budget >= REFINED else 0
        trials = search.search(budget, starts, space.neighbours, space.largest_step, steps)
        return self._confirm(search, trials, left)

    @property
    def _layer(self) -> int:
        """The block at which the model starts under edits that spare its input."""
        return self.directions.layer_count // 2

    @property
    def _make_search(self) -> Callable[..., EditSearch]:
        """Makes the search, from what `EditSearch` takes."""
        return EditSearch

    def _open_search(
        self, builder: EditBuilder, prompts: ValPrompts, answers: Answered, preserved: Mapping[str, Answered]
    ) -> EditSearch:
        layer = self._layer
        return self._make_search(
            self.model,
            builder,
            self.readout,
            prompts.target,
            AnsweredPrompts(self.model, *answers, layer=layer),
            {name: AnsweredPrompts(self.model, *each, layer=layer) for name, each in preserved.items()},
            known=self.journal,
            examples=prompts.examples,
            layer=layer,
        )

    def _confirm(self, search: EditSearch, trials: list[Trial], left: CheckAnswers) -> list[Trial]:
        return confirm(search, trials, self.journal, left)

    def _answered(self, name: str, ids: Sequence[list[int]]) -> Answered | None:
        """Prompts with the model's own answers, those with empty answers left out; None if nothing is left."""
        if name not in self.journal:
            with track("the model's own answers", len(ids), "prompts") as advance:
                self.journal.put({name: self.generate(list(ids), ANSWER_TOKENS, advance)})
            check()
        pairs = [(row, answer) for row, answer in zip(ids, self.journal[name], strict=True) if answer]
        return ([row for row, _ in pairs], [answer for _, answer in pairs]) if pairs else None
