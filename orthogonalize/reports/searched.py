"""The search that an edit comes from, as a report stores it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..evals.metrics import Record

if TYPE_CHECKING:
    from ..edits.config import EditConfig
    from ..selection.search.objectives import Trial


class Tried(Record):
    """One edit tried on val prompts: its share of `left` behaviour and its KL (see `Trial`).

    `pick` is its number for `edit --pick`, if it is among the best; `chosen` marks the edit that is reported.
    """

    edit: str
    left: float
    kl: float
    pick: int | None = None
    chosen: bool = False


class Search(Record):
    """The edits that a run tried, the best first; `before` is `left` of the base, `allowed` the share that is none."""

    before: float
    allowed: float
    tried: list[Tried]


def searched(trials: Sequence[Trial], made: EditConfig | None) -> Search | None:
    """The search of a run, given its trials with the best first and the edit that was `made`; None without trials.

    Edits whose KL is not a number are left out.
    """
    from ..selection.search.objectives import LEFT, shortlist

    if not trials:
        return None
    numbers = {trial.choice: number for number, trial in enumerate(shortlist(trials), 1)}
    tried = [
        Tried(
            edit=trial.choice.describe(),
            left=trial.left,
            kl=trial.kl,
            pick=numbers.get(trial.choice),
            chosen=trial.choice == made,
        )
        for trial in trials
        if math.isfinite(trial.kl)
    ]
    return Search(before=trials[0].before, allowed=max(LEFT, trials[0].usual), tried=tried)
