"""Try whole edits in a vLLM engine: the weights of each are swapped in, measured beside the base's, and swapped out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from ....edits.config import EditConfig
from ....engines.reading.streams import Outputs, Wanted
from ...search.drift import DriftSums
from ...search.objectives import Trial
from ...search.trials import EditSearch
from ...search.try_edits import EditTrials
from ..measured_sets import EXAMPLES, NEGATIVE, TARGET, Ids, MeasuredSets, SetSearch
from .model import ServedModel, edit_plan
from .scores import BASE_LOGPROB, EXACT_KL, LOGPROB, behaviour_of, scores_of

ACTIVITY = "trying an edit"


@dataclass
class ServedSearch(SetSearch):
    """A search that measures edits in the engine of `served`."""

    served: ServedModel = field(kw_only=True)
    _base: MeasuredSets | None = field(default=None, init=False)
    _base_of: int = field(default=0, init=False)  # the start of the engine whose workers keep the base's logits

    @cached_property
    def _scored(self) -> dict[str, Ids]:
        """The prompts that are scored of an edit, by set."""
        return {TARGET: self.target, **{key: self.answered[key].prompts for key in self.preserved_keys.values()}}

    @property
    def measured_base(self) -> MeasuredSets:
        if self._base is None or self._base_of != self.served.starts:
            usual = {NEGATIVE: self.answers.prompts} if self.examples is None else {EXAMPLES: self.examples}
            self.served.streams().ask(ACTIVITY, "forget_base")
            self._base = self._measured({**self._scored, **usual}, keep=True)
            self._base_of = self.served.starts
        return self._base

    def edited(self, choice: EditConfig) -> AbstractContextManager[Any]:
        """Swap the weights of an edit in."""
        plan = edit_plan(self.served.source, self.build(choice))
        self.served.fit(plan)
        return self.served.edited(plan)

    def _measure(self, choice: EditConfig) -> Trial:
        edited = self.edited(choice)  # which may start the engine again
        base = self.measured_base
        with edited:
            own = self._measured(self._scored, keep=False)
        return self.trial_of(choice, own, base)

    def _measured(self, scored: Mapping[str, Ids], keep: bool) -> MeasuredSets:
        """Measure the model as it is on the sets `scored`, and along the answers."""
        return MeasuredSets({name: self._scores(ids) for name, ids in scored.items()}, self._drifts(keep))

    def _scores(self, ids: Ids) -> torch.Tensor:
        outputs = Outputs(behaviour_of(self.readout))
        found = self._read([Wanted(row) for row in ids], outputs, self.readout.layers)
        return torch.cat([scores_of(self.readout, portion) for portion in found])

    def _drifts(self, keep: bool) -> dict[str, DriftSums]:
        """How far the model is from the base along the answers; the base from itself if its logits are to be kept."""
        wanted: list[Wanted] = []
        owners: list[tuple[DriftSums, int]] = []
        sums = {name: DriftSums(each.answers) for name, each in self.answered.items()}
        for name, each in self.answered.items():
            for number, (prompt, answer) in enumerate(zip(each.prompts, each.answers, strict=True)):
                first = len(prompt) - 1
                wanted.append(Wanted([*prompt, *answer], first, first + len(answer), base=len(wanted)))
                owners.append((sums[name], number))
        for portion in self._read(wanted, Outputs((), keep, along=True)):
            for row, measured in zip(portion.rows, portion.outputs, strict=True):
                own, number = owners[row]
                own.add_measured(number, measured[:, EXACT_KL], measured[:, BASE_LOGPROB], measured[:, LOGPROB])
        return sums

    def _read(self, wanted: Sequence[Wanted], outputs: Outputs, layers: Sequence[int] = ()) -> Iterator[Any]:
        longest = max(len(each.ids) for each in wanted) + 1
        return self.served.streams(longest).read(ACTIVITY, wanted, layers, outputs=outputs)


class ServedTrials(EditTrials):
    """Tries edits in a vLLM engine; `served` is the model, the other arguments are those of `EditTrials`."""

    def __init__(self, served: ServedModel, *others: Any) -> None:
        super().__init__(None, *others)
        self.served = served

    @property
    def _layer(self) -> int:
        return 0  # the engine runs all blocks

    @property
    def _make_search(self) -> Callable[..., EditSearch]:
        return partial(ServedSearch, served=self.served)
