"""What readers without a resident model measure of an edit, by set of prompts, and the trial that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ...core.progress import Progress
from ...edits.config import EditConfig
from ..search.drift import AnsweredPrompts, DriftSums
from ..search.objectives import Trial, share_flipped
from ..search.trials import EditSearch

Ids = Sequence[Sequence[int]]
TARGET, EXAMPLES, NEGATIVE = "target", "examples", "answers"  # names of sets; preserved sets follow by their own


@dataclass
class MeasuredSets:
    """First-token scores [prompts] of the base or of an edit, and its drift from the base, by set."""

    scores: dict[str, torch.Tensor]
    drifts: dict[str, DriftSums]


@dataclass
class SetSearch(EditSearch):
    """A search that measures all sets of prompts of an edit together, and compares them with the base's."""

    @property
    def measured_base(self) -> MeasuredSets:
        """What is measured of the base; examples are scored as well, if there are any."""
        raise NotImplementedError

    @cached_property
    def preserved_keys(self) -> dict[str, str]:
        """The preserved sets' names among all sets, by their own names."""
        return {name: f"preserved: {name}" for name in self.preserved}

    @cached_property
    def answered(self) -> dict[str, AnsweredPrompts]:
        """Prompts with the base's answers, by set."""
        return {NEGATIVE: self.answers, **{key: self.preserved[name] for name, key in self.preserved_keys.items()}}

    @cached_property
    def before(self) -> float:
        return self._left(self.measured_base.scores[TARGET])

    @cached_property
    def usual(self) -> float:
        return self._left(self.measured_base.scores[NEGATIVE if self.examples is None else EXAMPLES])

    def trial_of(self, choice: EditConfig, own: MeasuredSets, base: MeasuredSets) -> Trial:
        """The trial of an edit of which `own` was measured, and `base` of the base."""
        return self._trial(
            choice,
            own.scores[TARGET],
            own.drifts[NEGATIVE].drift,
            {name: own.drifts[key].drift for name, key in self.preserved_keys.items()},
            {name: share_flipped(base.scores[key], own.scores[key]) for name, key in self.preserved_keys.items()},
        )

    def _refine_strengths(self, steps: int, advance: Progress) -> None:
        """Leaves sites at one strength: gradients would need the whole model."""
