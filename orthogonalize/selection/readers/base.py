"""What `extract` asks of a model, whether that is whole in memory or streamed block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ...checkpoints.checkpoint import Checkpoint
from ...core.errors import OrthogonalizeError
from ...core.journal import Journal
from ...core.progress import track
from ...directions.activation_store import record_with
from ...directions.direction_set import Directions
from ...models.activations import mean_activations
from ...models.generation import generate, stop_tokens
from ..candidates import Candidate
from ..fits import Fits
from ..readouts import Outputs, Readout
from ..search.objectives import CheckAnswers, Trial
from ..search.try_edits import EditTrials, ValPrompts
from .direction_scoring import Places
from .kept_activations import KeptActivations
from .resident_scores import score_candidates

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Scored:
    """What candidates and edits are measured with.

    `directions` are the run's, and `readout` scores the behaviour. `places` are the positions and layers whose
    directions are scored, and `enough` says how many of a finder (see `score_candidates`).
    """

    directions: Directions
    readout: Readout
    journal: Journal
    places: Places | None = None
    enough: int | None = None


class Reader(Protocol):
    """A model as `extract` uses it.

    `name` is the value of `--engine`; `generates` says whether it gives whole answers.
    """

    name: str
    generates: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        ...

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model knows."""
        ...

    @property
    def layer_count(self) -> int:
        """The number of blocks."""
        ...

    def outputs(self, ids: Ids, layers: Sequence[int] = (), later: Ids = ()) -> Outputs:
        """The first-token probabilities of prompts, and the streams at the inputs of `layers`.

        `later`: further prompts whose answers will be asked for.

        Raises:
            OrthogonalizeError: they are not all numbers.
        """
        ...

    def record(self, sets: Mapping[str, Ids], inputs: Any) -> None:
        """Store the activations of `sets` of prompts in the run folder (see `activation_store.record`)."""
        ...

    def answers(self, ids: list[list[int]], tokens: int, advance: Callable[[int], None]) -> list[list[int]]:
        """The model's own greedy answers, of at most so many tokens."""
        ...

    def score(
        self, positive: Ids, negative: Ids, finders: Sequence[str], everywhere: bool, given: Scored
    ) -> list[Candidate]:
        """Scores of every candidate on val prompts (see `score_candidates`)."""
        ...

    def try_edits(
        self,
        budget: int,
        prompts: ValPrompts,
        ranked: Sequence[Candidate],
        given: Scored,
        left: CheckAnswers,
    ) -> list[Trial]:
        """Up to `budget` whole edits tried on val prompts, the best first (see `EditTrials`)."""
        ...

    def close(self) -> None:
        """Remove what was kept in the run folder for later stages: the last is done."""
        ...


class ResidentReader:
    """A model that is whole in the memory of one device; it is loaded when it is first needed.

    Args:
        load: loads it.
        tokenizer: its tokenizer.
        positions, layers: how many tokens and streams of every prompt to store.
        out: the run folder.
        source, weights: the checkpoint, and the SHA-256 of each of its weight files.
    """

    name, generates = "hf", True

    def __init__(
        self,
        load: Callable[[], Any],
        tokenizer: Any,
        positions: int,
        layers: int,
        out: Path,
        source: Checkpoint,
        weights: dict[str, str],
    ) -> None:
        self._load, self.tokenizer = load, tokenizer
        self.positions, self.layers, self.out = positions, layers, out
        self.source, self.weights = source, weights
        self._kept = KeptActivations(positions)

    @cached_property
    def model(self) -> Any:
        return self._load()

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.model.dtype
        return found

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def layer_count(self) -> int:
        return self.layers - 1

    def outputs(self, ids: Ids, layers: Sequence[int] = (), later: Ids = ()) -> Outputs:
        with track("scoring prompts", len(ids), "prompts") as advance:
            found = self._kept.outputs(self.model, ids, layers, advance)
        if not torch.isfinite(found.probabilities).all():
            mean_activations(self.model, ids, 1)  # its error names the layer, if a layer is the cause
            raise OrthogonalizeError("the model's outputs contain NaN or infinite values; the checkpoint is damaged")
        return found

    def record(self, sets: Mapping[str, Ids], inputs: Any) -> None:
        shape = self.model.dtype, self.model.get_input_embeddings().embedding_dim
        capture = partial(self._kept.capture, self.model)
        record_with(capture, shape, sets, self.positions, self.layers, self.out, inputs)
        self._kept.forget()

    def answers(self, ids: list[list[int]], tokens: int, advance: Callable[[int], None]) -> list[list[int]]:
        return generate(self.model, ids, tokens, stop_tokens(self.model, self.tokenizer), progress=advance)

    def score(
        self, positive: Ids, negative: Ids, finders: Sequence[str], everywhere: bool, given: Scored
    ) -> list[Candidate]:
        return score_candidates(
            self.model, positive, negative, given.directions, finders, given.readout, everywhere, given.journal,
            given.places, given.enough,
        )  # fmt: skip

    def try_edits(
        self,
        budget: int,
        prompts: ValPrompts,
        ranked: Sequence[Candidate],
        given: Scored,
        left: CheckAnswers,
    ) -> list[Trial]:
        fits = Fits(self.out, given.directions, self.source.config, self.weights, lambda: self.model)
        trials = EditTrials(
            self.model, self.source, given.directions, ranked, given.readout, self.answers, given.journal
        )
        return trials.run(budget, prompts, fits, left)

    def close(self) -> None:
        pass
