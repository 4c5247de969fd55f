"""Judging answers: in the engine of a judge's model, or by their wording; also of answers made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import OrthogonalizeError
from ...core.journal import Journal, fingerprint_of
from ...core.progress import note
from ...engines.base import EngineOptions
from ...engines.registry import engine_state, open_engine
from ...models.loading import check_complete, load_tokenizer
from ...models.resolve import context_length, find_model, folder_state
from ..metrics import Series, yes_no_series
from ..resumable import ResumableEngine
from .catalogue import Judge, Judgement, find_judge

PREFIX = "prefix"


@dataclass(frozen=True)
class ReadyJudge:
    """A judge whose model has been found, so that what is missing shows before hours are spent."""

    judge: Judge
    model: str
    folder: Path
    tokenizer: Any

    def step(self, pairs: Sequence[tuple[str, str]], engine: str, options: EngineOptions) -> str:
        """The journal's step for the judge's opinions on `pairs`."""
        state = fingerprint_of(engine_state(engine, options), folder_state(self.folder), self.judge.name, pairs)
        return f"judge/{self.judge.name}={self.model}@{state[:16]}"

    def ask(
        self, pairs: Sequence[tuple[str, str]], engine: str, options: EngineOptions, journal: Journal
    ) -> list[Judgement]:
        """The judge's opinion on every (prompt, response), kept in `journal`; its model is started for it.

        Where its context is too short for an answer, nothing can be read of that one.
        """
        step = self.step(pairs, engine, options)

        def ask() -> list[Judgement]:
            lengths = [len(self.judge.encode(self.tokenizer, *pair)) + self.judge.new_tokens + 1 for pair in pairs]
            room = context_length(self.folder) or max(lengths)
            fitting = [i for i, length in enumerate(lengths) if length <= room]
            result = [Judgement()] * len(pairs)
            if len(fitting) < len(pairs):
                note(f"{len(pairs) - len(fitting)} answers do not fit into {self.judge.name}'s {room} tokens: not read")
            if fitting:
                most = max(lengths[i] for i in fitting)
                with open_engine(engine, self.folder, self.tokenizer, most, options) as running:
                    engine_ = ResumableEngine(running, journal, step)
                    found = self.judge.opinions(engine_, self.tokenizer, [pairs[i] for i in fitting])
                for i, opinion in zip(fitting, found, strict=True):
                    result[i] = opinion
            return result

        return [Judgement(*opinion) for opinion in journal.step(step, ask)]


def ready_judges(names: Sequence[str]) -> list[ReadyJudge]:
    """The judges called `names` (`NAME` or `NAME=MODEL`), their models fetched.

    Raises:
        OrthogonalizeError: an unknown judge; a model that is gated, missing, or whose tokenizer is.
    """
    found: list[ReadyJudge] = []
    for name in names:
        if name == PREFIX:
            raise OrthogonalizeError("by wording (prefix) refusals are counted anyway; name a judge that is a model")
        judge, model = find_judge(name)
        if any(ready.judge.name == judge.name for ready in found):
            raise OrthogonalizeError(f"judge {judge.name} is named twice; ask one model of it at a time")
        try:
            folder = find_model(model)
            check_complete(folder)
        except OrthogonalizeError as error:
            raise OrthogonalizeError(f"judge {judge.name}: {error}") from error
        tokenizer = load_tokenizer(folder)
        judge.encode(tokenizer, "What is baked here?", "A loaf of bread.")  # its template works, or says so now
        found.append(ReadyJudge(judge, model, folder, tokenizer))
    return found


def opinion_series(
    name: str,
    says: Sequence[str],
    opinions: Mapping[str, Sequence[Judgement]],
    categories: Mapping[str, Sequence[str | None]],
    keys: Mapping[str, str],
) -> dict[str, Series]:
    """Series of one judge by dotted key: `opinions` and `categories` by prompt set, `keys` the sets' own."""
    return {
        f"judges.{name}.{field}.{keys[each]}": yes_no_series([getattr(o, field) for o in found], categories[each])
        for field in says
        for each, found in opinions.items()
    }
