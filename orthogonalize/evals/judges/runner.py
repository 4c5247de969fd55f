"""Run one judge model over pairs of prompt and answer; an interrupted run resumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoints.checkpoint import open_checkpoint
from ...checkpoints.settings_files import context_length
from ...core.errors import OrthogonalizeError
from ...core.files import fingerprint
from ...core.journal import Journal
from ...core.progress import note
from ...engines.base import EngineOptions
from ...engines.registry import engine_state, open_engine
from ...models.loading import check_complete, load_tokenizer
from ...models.resolve import find_model, folder_state
from ..metrics import Series, yes_no_series
from ..resumable import ResumableEngine
from .base import EndpointJudge, Judgement, ModelJudge
from .registry import address_of, find_judge, find_model_judge, judge_name
from .remote import ReadyEndpoint


@dataclass(frozen=True)
class ReadyJudge:
    """A judge whose model is on disk and whose template works, both checked before anything is measured."""

    judge: ModelJudge
    model: str
    folder: Path
    tokenizer: Any

    def step(self, pairs: Sequence[tuple[str, str]], engine: str, options: EngineOptions) -> str:
        """The journal step of the judgements of `pairs`."""
        state = fingerprint([engine_state(engine, options), folder_state(self.folder), self.judge.name, pairs])
        return f"judge/{self.judge.name}={self.model}@{state[:16]}"

    def ask(
        self, pairs: Sequence[tuple[str, str]], engine: str, options: EngineOptions, journal: Journal
    ) -> list[Judgement]:
        """The judgement of every (prompt, response), stored in `journal`; starts an engine for the judge's model.

        An answer that does not fit into the judge's context gets an empty judgement.
        """
        step = self.step(pairs, engine, options)

        def ask() -> list[Judgement]:
            lengths = [len(self.judge.encode(self.tokenizer, *pair)) + self.judge.new_tokens + 1 for pair in pairs]
            room = context_length(open_checkpoint(self.folder).config) or max(lengths)
            fitting = [i for i, length in enumerate(lengths) if length <= room]
            result = [Judgement()] * len(pairs)
            if len(fitting) < len(pairs):
                dropped = len(pairs) - len(fitting)
                note(f"{dropped} answers do not fit into {self.judge.name}'s context of {room} tokens; skipping them")
            if fitting:
                most = max(lengths[i] for i in fitting)
                with open_engine(engine, self.folder, self.tokenizer, most, options) as running:
                    resumable = ResumableEngine(running, journal, step)
                    found = self.judge.judge(resumable, self.tokenizer, [pairs[i] for i in fitting])
                for i, judgement in zip(fitting, found, strict=True):
                    result[i] = judgement
            return result

        return [Judgement(*row) for row in journal.step(step, ask)]


Ready = ReadyJudge | ReadyEndpoint


def ready_judges(names: Sequence[str]) -> list[Ready]:
    """The judges called `names` (see `find_judge`), with their models fetched, or their servers asked.

    Raises:
        OrthogonalizeError: a judge is unknown, its model or tokenizer is gated or missing, or its server is silent.
    """
    found: list[Ready] = []
    for name in names:
        if any(ready.judge.name == judge_name(name) for ready in found):
            raise OrthogonalizeError(f"judge {judge_name(name)} is given twice; use one model of it at a time")
        try:
            found.append(_ready(name))
        except OrthogonalizeError as error:
            said = str(error)
            mine = f"judge {judge_name(name)}"
            raise OrthogonalizeError(
                said if said.startswith(("judge ", "unknown judge")) else f"{mine}: {said}"
            ) from error
    return found


def _ready(name: str) -> Ready:
    known = find_judge(name)
    if isinstance(known, EndpointJudge):
        return ReadyEndpoint.of(known, address_of(name))
    judge, model = find_model_judge(name)
    folder = find_model(model)
    check_complete(folder)
    tokenizer = load_tokenizer(folder)
    judge.encode(tokenizer, "What is baked here?", "A loaf of bread.")  # raises here if its template does not work
    return ReadyJudge(judge, model, folder, tokenizer)


def judgement_series(
    name: str,
    fields: Sequence[str],
    judgements: Mapping[str, Sequence[Judgement]],
    categories: Mapping[str, Sequence[str | None]],
    keys: Mapping[str, str],
) -> dict[str, Series]:
    """One judge's series by dotted key.

    `judgements` and `categories` are by prompt set, and `keys` are the sets' own parts of the dotted key.
    """
    return {
        f"judges.{name}.{field}.{keys[each]}": yes_no_series([getattr(o, field) for o in found], categories[each])
        for field in fields
        for each, found in judgements.items()
    }
