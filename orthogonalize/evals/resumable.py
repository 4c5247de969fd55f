"""A long suite in portions, each kept when done: who is killed in the middle of 14,000 questions goes on there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from ..core.errors import NoNumberError
from ..core.interrupts import check
from ..core.journal import Journal
from ..engines.base import Ids, Responder
from ..models.logprobs import Completion, Likeliest

PORTION = 1024  # prompts asked together: enough to keep an engine busy


class ResumableEngine:
    """What `engine` says, asked in portions that `journal` keeps below `step` until that itself is done."""

    def __init__(self, engine: Responder, journal: Journal, step: str) -> None:
        self.engine, self.journal, self.step, self.size = engine, journal, step, PORTION
        self.calls = 0

    def answers(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[list[int]]:
        def ask(part: slice) -> list[Any]:
            if not part.start and prompts and len(prompts[0]) > 1:  # of NaN an engine makes answers like any others
                self._check(c.logprob for c in self.engine.scores([prompts[0][:-1]], [prompts[0][-1:]]))
            return self.engine.answers(prompts[part], max_new_tokens)

        return self._asked(len(prompts), ask)

    def scores(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Completion]:
        def ask(part: slice) -> list[Any]:
            return [[c.logprob, c.greedy] for c in self.engine.scores(prompts[part], completions[part])]

        rows = self._asked(len(prompts), ask)
        self._check(logprob for logprob, _ in rows)
        return [Completion(*row) for row in rows]

    def choices(self, contexts: Sequence[Ids], choices: Sequence[Sequence[Ids]]) -> list[list[float]]:
        rows = self._asked(len(contexts), lambda part: self.engine.choices(contexts[part], choices[part]))
        self._check(value for row in rows for value in row)
        return rows

    def likeliest(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Likeliest]:
        """Whole: there are few of these, and their distributions would fill the journal."""
        check()
        found = self.engine.likeliest(prompts, completions)
        self._check(float(each.logprobs.sum()) for each in found if len(each.logprobs))
        return found

    def _check(self, numbers: Iterable[float]) -> None:
        if any(math.isnan(number) for number in numbers):
            what = re.sub("@[0-9a-f]+", "", self.step)  # a step's name without the fingerprints of its state
            raise NoNumberError(f"{what}: the model's log-probabilities are NaN; are its weights damaged?")

    def _asked(self, count: int, ask: Callable[[slice], list[Any]]) -> list[Any]:
        check()
        self.calls += 1
        if count <= self.size:
            return ask(slice(None))
        found: list[Any] = []
        for first in range(0, count, self.size):
            check()
            work = partial(ask, slice(first, first + self.size))
            found += self.journal.step(f"{self.step}/{self.calls}/{first}", work)
        return found
