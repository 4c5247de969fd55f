"""Try whole edits with a model that is never whole in memory: many in one pass over its weights, beside the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ...core.journal import Journal
from ...edits.config import EditConfig
from ...models.activations import TOKENS_PER_BATCH
from ...models.streaming.lanes import HEAD_NUMBERS, Lane, StreamedModel
from ...models.streaming.passes import Pass, edited_variant
from ...models.streaming.state import StreamState
from ..readouts import Outputs
from ..search.drift import DriftSums
from ..search.objectives import CheckAnswers, Trial
from ..search.trials import EditSearch
from ..search.try_edits import EditTrials
from .measured_sets import EXAMPLES, TARGET, MeasuredSets, SetSearch
from .streamed_fits import StreamedFits


@dataclass
class StreamedSearch(SetSearch):
    """A search that measures as many edits together as the memory for their streams allows.

    Attributes:
        streamed: the model.
        budget: bytes of streams that may be held at a time.
        state: where a pass is kept between interruptions.
        fits: prepares fitted edits before they are built.
    """

    streamed: StreamedModel = field(kw_only=True)
    budget: int = field(kw_only=True)
    state: Path = field(kw_only=True)
    fits: StreamedFits = field(kw_only=True)
    _base: MeasuredSets | None = field(default=None, init=False)

    @cached_property
    def _sets(self) -> dict[str, Sequence[Sequence[int]]]:
        """What passes through the blocks: the target's prompts, and the others with their answers."""
        rows = {
            name: [[*prompt, *answer] for prompt, answer in zip(each.prompts, each.answers, strict=True)]
            for name, each in self.answered.items()
        }
        return {TARGET: self.target, **rows}

    @property
    def at_once(self) -> int:
        tokens = sum(len(row) for rows in self._sets.values() for row in rows)
        return max(1, self.budget // (tokens * self.streamed.width * self.streamed.dtype.itemsize))

    @property
    def measured_base(self) -> MeasuredSets:
        if self._base is None:
            self._pass({})
        assert self._base is not None
        return self._base

    def _measure_all(self, choices: Sequence[EditConfig]) -> list[Trial]:
        self.fits.prepare(choices)
        found = self._pass({str(number): choice for number, choice in enumerate(choices)})
        base = self.measured_base
        return [self.trial_of(choice, found[str(number)], base) for number, choice in enumerate(choices)]

    def _pass(self, choices: Mapping[str, EditConfig]) -> dict[str, MeasuredSets]:
        """Take the base and the edits, by name, through the model; the base is kept."""
        streamed = self.streamed
        sets = self._sets if self.examples is None else {**self._sets, EXAMPLES: self.examples}
        places = {key: ("", key) for key in sets}
        places |= {f"{edit} {key}": (edit, key) for edit in choices for key in self._sets}
        edits = {edit: self.build(choice) for edit, choice in choices.items()}
        variants = [
            edited_variant(name, key, edits[edit], streamed.layer_count) for name, (edit, key) in places.items() if edit
        ]
        state = StreamState(self.state, [self._depends, [choice.model_dump_json() for choice in choices.values()]])
        vocabulary = streamed.model.config.get_text_config().vocab_size
        one_pass = Pass(
            streamed, sets, variants, state, tokens=min(TOKENS_PER_BATCH, max(1, HEAD_NUMBERS // vocabulary))
        )
        one_pass.run("trying edits")
        found = {edit: self._empty(sets) for edit in ["", *choices]}
        logprobs = torch.empty(0)  # the base's, of the lane that comes next
        for name, lane, logits in one_pass.logits(self._wanted):
            edit, key = places[name]
            here = logits.log_softmax(-1)
            if not edit:
                logprobs = here
            self._note(found[edit], key, lane, here, logprobs)
        self._base = self._base or found[""]
        state.close()
        return found

    @property
    def _depends(self) -> Any:
        return self.known.inputs if isinstance(self.known, Journal) else None

    def _empty(self, sets: Mapping[str, Sequence[Sequence[int]]]) -> MeasuredSets:
        scores = {key: torch.full((len(rows),), torch.nan, dtype=torch.float64) for key, rows in sets.items()}
        return MeasuredSets(scores, {key: DriftSums(each.answers) for key, each in self.answered.items()})

    def _wanted(self, key: str, lane: Lane) -> torch.Tensor:
        """The streams that the logits of answers follow from, or those of first tokens."""
        if key not in self.answered:
            return lane.last(1)[:, 0]
        prompts, answers = self.answered[key].prompts, self.answered[key].answers
        parts = []
        for place, row in enumerate(lane.rows):
            first = len(prompts[row]) - 1
            parts.append(lane.hidden[place, first : first + len(answers[row])])
        return torch.cat(parts)

    def _note(self, found: MeasuredSets, key: str, lane: Lane, logprobs: torch.Tensor, base: torch.Tensor) -> None:
        """Note what a lane tells, by log-probabilities at its wanted places."""
        answers = self.answered[key].answers if key in self.answered else None
        lengths = [1 if answers is None else len(answers[row]) for row in lane.rows]
        pairs = zip(torch.split(base, lengths), torch.split(logprobs, lengths), strict=True)
        for row, (before, after) in zip(lane.rows, pairs, strict=True):
            found.scores[key][row] = self.readout.scores(Outputs(after[0].exp(), {})).item()
            if key in found.drifts:
                found.drifts[key].add(row, before, after)


class StreamedTrials(EditTrials):
    """Tries edits with a streamed model, along the first tokens of its answers; nothing is confirmed by answers.

    Args:
        streamed: the model.
        fits: its fitted edits.
        budget, state: see `StreamedSearch`.
        others: those of `EditTrials`.
    """

    def __init__(self, streamed: StreamedModel, fits: StreamedFits, budget: int, state: Path, *others: Any) -> None:
        super().__init__(streamed.model, *others)
        self.streamed, self.fits, self.budget, self.state = streamed, fits, budget, state

    @property
    def _layer(self) -> int:
        return 0  # the lower blocks are not kept

    @property
    def _make_search(self) -> Callable[..., EditSearch]:
        return partial(
            StreamedSearch, streamed=self.streamed, budget=self.budget, state=self.state, fits=self.fits
        )  # fmt: skip

    def _confirm(self, search: EditSearch, trials: list[Trial], left: CheckAnswers) -> list[Trial]:
        return trials
