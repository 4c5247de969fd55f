"""What `extract` asks of a model that is never whole in memory: each request is one pass over its weights, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.checkpoint import Checkpoint
from ...core.errors import OrthogonalizeError
from ...core.files import fingerprint
from ...core.journal import Journal
from ...core.progress import note
from ...core.words import counted
from ...directions.activation_store import FILE, PROMPTS, Recording, copy_rows, record_streamed
from ...models.generation import stop_tokens
from ...models.streaming.lanes import StreamedModel
from ...models.streaming.weights import PartialModel
from ..candidates import Candidate
from ..readouts import Outputs
from ..search.objectives import CheckAnswers, Trial
from ..search.try_edits import ValPrompts
from ..settings import Settings
from .base import Ids, Scored
from .direction_scoring import Places
from .streamed_fits import STATE, StreamedFits, streams_budget
from .streamed_scores import StreamedScoring
from .streamed_trials import StreamedTrials

ALL_PROMPTS = ".prompts.partial"  # activations of all prompts, before they are filtered
FIRST_TOKENS = ".first-tokens.journal"
HEAD_ROWS = 256  # prompts whose logits are computed at a time


class StreamedReader:
    """A model that is streamed block by block; it is opened when it is first needed.

    It generates nothing: its own answers are given, or else cut to their first token, which the pass over the prompts
    gives.

    Args:
        source, weights: the checkpoint, and the SHA-256 of each of its weight files.
        settings: those of the extraction.
        tokenizer: the model's tokenizer.
        positions: how many tokens of every prompt to store.
        out: the run folder.
        given: answers by the fingerprint of the prompt (see `read_answers`).
    """

    name, generates = "stream", False

    def __init__(
        self,
        source: Checkpoint,
        weights: dict[str, str],
        settings: Settings,
        tokenizer: Any,
        positions: int,
        out: Path,
        given: Mapping[str, Sequence[int]],
    ) -> None:
        self.source, self.weights, self.settings, self.given = source, weights, settings, given
        self.tokenizer, self.positions, self.out = tokenizer, positions, out

    @cached_property
    def streamed(self) -> StreamedModel:
        return StreamedModel(PartialModel(self.source, self.settings.device, self.settings.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.streamed.dtype

    @property
    def vocabulary(self) -> int:
        return int(self.streamed.model.config.get_text_config().vocab_size)

    @property
    def budget(self) -> int:
        """Bytes of streams that a pass may hold."""
        return streams_budget()

    # prompts

    @property
    def layer_count(self) -> int:
        return self.streamed.layer_count

    def outputs(self, ids: Ids, layers: Sequence[int] = (), later: Ids = ()) -> Outputs:
        """See `Reader`. The activations of all these prompts are read in the same pass, and kept for `record`."""
        file, known, everything = self.out / ALL_PROMPTS, self._known, [*ids, *later]
        keys = [fingerprint(list(row)) for row in everything]
        fresh = not (file.is_file() and known.has(*keys))
        if fresh:
            self.out.mkdir(parents=True, exist_ok=True)
            inputs = [self.weights, str(self.dtype), everything]
            record_streamed(self.streamed, {PROMPTS: everything}, self.positions, file, inputs)
        found, rows = Recording(file), list(range(len(keys))) if fresh else [known[key][0] for key in keys]
        last = found.read(PROMPTS, self.streamed.layer_count)[rows, -1]
        probabilities = []
        firsts: list[int] = []
        with self.streamed.parts.head():
            for part in torch.split(last, HEAD_ROWS):
                logits = self.streamed.logits(part)
                firsts += logits.argmax(-1).tolist()
                probabilities.append(logits.softmax(-1).cpu())
        if not torch.isfinite(result := torch.cat(probabilities)).all():
            raise OrthogonalizeError("the model's outputs contain NaN or infinite values; the checkpoint is damaged")
        if fresh:
            known.put({key: [number, token] for key, number, token in zip(keys, rows, firsts, strict=True)})
        wanted = rows[: len(ids)]
        return Outputs(result[: len(ids)], {layer: found.read(PROMPTS, layer)[wanted, -1].float() for layer in layers})

    @property
    def _known(self) -> Journal:
        """By the fingerprint of a prompt that has been read, its number in the file and its answer's first token."""
        return Journal(self.out / FIRST_TOKENS, [self.weights, str(self.dtype)])

    def record(self, sets: Mapping[str, Ids], inputs: Any) -> None:
        """See `Reader`. Prompts that were read already cost no other pass."""
        file, known = self.out / ALL_PROMPTS, self._known
        wanted = {name: [fingerprint(list(row)) for row in ids] for name, ids in sets.items()}
        if file.is_file() and known.has(*(key for keys in wanted.values() for key in keys)):
            rows = {name: [known[key][0] for key in keys] for name, keys in wanted.items()}
            copy_rows(Recording(file), rows, self.out / FILE)
            return
        record_streamed(self.streamed, sets, self.positions, self.out / FILE, inputs)

    def answers(self, ids: list[list[int]], tokens: int, advance: Callable[[int], None]) -> list[list[int]]:
        """The given answers, or the first tokens of the model's own; none where an answer is empty."""
        keys = [fingerprint(list(row)) for row in ids]
        left = [number for number, key in enumerate(keys) if key not in self.given]
        if self.given and left:
            note(f"{len(left)} of {counted(len(ids), 'prompt')} have no answer in {self.settings.own_answers}")
        firsts = dict(zip(left, self._first_tokens([ids[number] for number in left]), strict=True))
        advance(len(ids))
        return [firsts[n] if n in firsts else list(self.given[key][:tokens]) for n, key in enumerate(keys)]

    def _first_tokens(self, ids: list[list[int]]) -> list[list[int]]:
        if not ids:
            return []
        keys = [fingerprint(list(row)) for row in ids]
        if not self._known.has(*keys):
            self.outputs(ids)
            (self.out / ALL_PROMPTS).unlink()  # the numbers of the prompts that were read before are not of this file
        known, stops = self._known, stop_tokens(self.streamed.model, self.tokenizer)
        firsts = [known[key][1] for key in keys]
        return [[] if token in stops else [token] for token in firsts]

    # selection

    def score(
        self, positive: Ids, negative: Ids, finders: Sequence[str], everywhere: bool, given: Scored
    ) -> list[Candidate]:
        if given.readout.layers:
            raise OrthogonalizeError(
                "--engine stream scores edits by how answers begin, which does not tell the two sides apart here; "
                "give --behaviour-tokens, or use --engine hf"
            )
        directions = given.directions
        scoring = StreamedScoring(
            self.streamed,
            {"positive": positive, "negative": negative},
            directions,
            given.readout,
            everywhere,
            given.places or Places.of(directions.positions, directions.layer_count),
            self.budget,
            self.out / STATE,
        )
        return scoring.score(finders, given.journal)

    def try_edits(
        self,
        budget: int,
        prompts: ValPrompts,
        ranked: Sequence[Candidate],
        given: Scored,
        left: CheckAnswers,
    ) -> list[Trial]:
        fits = StreamedFits(
            lambda: self.streamed, ranked, self.budget, self.out / STATE,
            self.out, given.directions, self.source.config, self.weights,
        )  # fmt: skip
        trials = StreamedTrials(
            self.streamed, fits, self.budget, self.out / STATE,
            self.source, given.directions, ranked, given.readout, self.answers, given.journal,
        )  # fmt: skip
        return trials.run(budget, prompts, fits, left)

    def close(self) -> None:
        """See `Reader`."""
        (self.out / ALL_PROMPTS).unlink(missing_ok=True)
        self._known.close()
