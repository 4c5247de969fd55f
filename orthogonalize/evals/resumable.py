"""Run an engine in portions and store each, so that an interrupted run resumes mid-suite."""

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

PORTION = 1024  # prompts per portion: enough to keep an engine busy


class ResumableEngine:
    """`engine`, run in portions that `journal` stores under `step` until the whole step is done.

    Raises:
        NoNumberError: from any method, if the model's log-probabilities are NaN.
    """

    def __init__(self, engine: Responder, journal: Journal, step: str) -> None:
        self.engine, self.journal, self.step, self.size = engine, journal, step, PORTION
        self.calls = 0

    def answers(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[list[int]]:
        def ask(part: slice) -> list[Any]:
            if not part.start and prompts and len(prompts[0]) > 1:  # an engine decodes NaN logits without complaint
                self._check(c.logprob for c in self.engine.scores([prompts[0][:-1]], [prompts[0][-1:]]))
            return self.engine.answers(prompts[part], max_new_tokens)

        return self._in_portions(len(prompts), ask)

    def scores(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Completion]:
        def ask(part: slice) -> list[Any]:
            return [[c.logprob, c.greedy] for c in self.engine.scores(prompts[part], completions[part])]

        rows = self._in_portions(len(prompts), ask)
        self._check(logprob for logprob, _ in rows)
        return [Completion(*row) for row in rows]

    def choices(self, contexts: Sequence[Ids], choices: Sequence[Sequence[Ids]]) -> list[list[float]]:
        rows = self._in_portions(len(contexts), lambda part: self.engine.choices(contexts[part], choices[part]))
        self._check(value for row in rows for value in row)
        return rows

    def likeliest(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Likeliest]:
        """In one portion: there are few prompts, and their distributions would fill the journal."""
        check()
        found = self.engine.likeliest(prompts, completions)
        self._check(float(each.logprobs.sum()) for each in found if len(each.logprobs))
        return found

    def _check(self, numbers: Iterable[float]) -> None:
        if any(math.isnan(number) for number in numbers):
            name = re.sub("@[0-9a-f]+", "", self.step)  # the step without its fingerprints
            raise NoNumberError(f"{name}: the model's log-probabilities are NaN; its weights may be damaged")

    def _in_portions(self, count: int, ask: Callable[[slice], list[Any]]) -> list[Any]:
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
