"""Try whole edits with a model that is never whole in memory: many in one pass over its weights, beside the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...core.journal import Journal
from ...core.progress import Progress
from ...edits.config import EditConfig
from ...models.activations import TOKENS_PER_BATCH
from ...models.streaming.lanes import HEAD_NUMBERS, Lane, StreamedModel
from ...models.streaming.passes import Pass, edited_variant
from ...models.streaming.state import StreamState
from ..builder import EditBuilder
from ..readouts import Outputs
from ..search.drift import AnsweredPrompts, Drift, DriftSums
from ..search.objectives import CheckAnswers, Trial, share_flipped
from ..search.trials import EditSearch
from ..search.try_edits import Answered, EditTrials, ValPrompts
from .streamed_fits import StreamedFits

Ids = Sequence[Sequence[int]]
TARGET, EXAMPLES, NEGATIVE = "target", "examples", "answers"  # sets of a pass; preserved sets follow by name


@dataclass
class _Measured:
    """What a pass tells of the base or of an edit: first-token scores by set and prompt, and the drift by set."""

    scores: dict[str, torch.Tensor]
    drifts: dict[str, DriftSums]


@dataclass
class StreamedSearch(EditSearch):
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
    _base: _Measured | None = field(default=None, init=False)

    @cached_property
    def _answered(self) -> dict[str, tuple[Ids, Ids]]:
        """Prompts with answers by the name of their set."""
        named = {NEGATIVE: self.answers, **{f"preserved: {name}": each for name, each in self.preserved.items()}}
        return {name: (each.prompts, each.answers) for name, each in named.items()}

    @cached_property
    def _sets(self) -> dict[str, Sequence[Sequence[int]]]:
        """What passes through the blocks: the target's prompts, and the others with their answers."""
        rows = {
            name: [[*prompt, *answer] for prompt, answer in zip(*each, strict=True)]
            for name, each in self._answered.items()
        }
        return {TARGET: self.target, **rows}

    @property
    def at_once(self) -> int:
        tokens = sum(len(row) for rows in self._sets.values() for row in rows)
        return max(1, self.budget // (tokens * self.streamed.width * self.streamed.dtype.itemsize))

    @cached_property
    def before(self) -> float:
        return self._left(self._measured_base.scores[TARGET])

    @cached_property
    def usual(self) -> float:
        return self._left(self._measured_base.scores[NEGATIVE if self.examples is None else EXAMPLES])

    @property
    def _measured_base(self) -> _Measured:
        if self._base is None:
            self._pass({})
        assert self._base is not None
        return self._base

    def _measure_all(self, choices: Sequence[EditConfig]) -> list[Trial]:
        self.fits.prepare(choices)
        found = self._pass({str(number): choice for number, choice in enumerate(choices)})
        base = self._measured_base
        trials = []
        for number, choice in enumerate(choices):
            own = found[str(number)]
            drifts: dict[str, Drift] = {name: each.drift for name, each in own.drifts.items()}
            kept = {name: f"preserved: {name}" for name in self.preserved}
            trials.append(
                self._trial(
                    choice,
                    own.scores[TARGET],
                    drifts[NEGATIVE],
                    {name: drifts[key] for name, key in kept.items()},
                    {name: share_flipped(base.scores[key], own.scores[key]) for name, key in kept.items()},
                )
            )
        return trials

    def _refine_strengths(self, steps: int, advance: Progress) -> None:
        """Leaves sites at one strength: gradients would need the whole model."""

    def _pass(self, choices: Mapping[str, EditConfig]) -> dict[str, _Measured]:
        """Take the base and the edits, by name, through the model; the base is kept."""
        streamed = self.streamed
        sets = self._sets if self.examples is None else {**self._sets, EXAMPLES: self.examples}
        places = {key: ("", key) for key in sets}
        places |= {f"{edit} {key}": (edit, key) for edit in choices for key in self._sets}
        edits = {edit: self.build(choice) for edit, choice in choices.items()}
        variants = [
            edited_variant(streamed.model, name, key, edits[edit], streamed.layer_count)
            for name, (edit, key) in places.items()
            if edit
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

    def _empty(self, sets: Mapping[str, Sequence[Sequence[int]]]) -> _Measured:
        scores = {key: torch.full((len(rows),), torch.nan, dtype=torch.float64) for key, rows in sets.items()}
        return _Measured(scores, {key: DriftSums(answers) for key, (_, answers) in self._answered.items()})

    def _wanted(self, key: str, lane: Lane) -> torch.Tensor:
        """The streams that the logits of answers follow from, or those of first tokens."""
        if key not in self._answered:
            return lane.last(1)[:, 0]
        prompts, answers = self._answered[key]
        parts = []
        for place, row in enumerate(lane.rows):
            first = len(prompts[row]) - 1
            parts.append(lane.hidden[place, first : first + len(answers[row])])
        return torch.cat(parts)

    def _note(self, found: _Measured, key: str, lane: Lane, logprobs: torch.Tensor, base: torch.Tensor) -> None:
        """Note what a lane tells, by log-probabilities at its wanted places."""
        answers = self._answered[key][1] if key in self._answered else None
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

    def _open_search(
        self, builder: EditBuilder, prompts: ValPrompts, answers: Answered, preserved: Mapping[str, Answered]
    ) -> EditSearch:
        return StreamedSearch(
            self.model,
            builder,
            self.readout,
            prompts.target,
            AnsweredPrompts(self.model, *answers),
            {name: AnsweredPrompts(self.model, *each) for name, each in preserved.items()},
            known=self.journal,
            examples=prompts.examples,
            streamed=self.streamed,
            budget=self.budget,
            state=self.state,
            fits=self.fits,
        )

    def _confirm(self, search: EditSearch, trials: list[Trial], left: CheckAnswers) -> list[Trial]:
        return trials
