"""What `extract` asks of a model that vLLM runs, on as many GPUs as it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ....architectures.schema import architecture_of
from ....checkpoints.checkpoint import Checkpoint
from ....core.errors import OrthogonalizeError
from ....core.progress import note
from ....directions.activation_store import record_with
from ....engines.reading.streams import LOGITS, Wanted
from ....engines.vllm import SLICE
from ....models.activations import check_finite, check_lengths
from ...candidates import Candidate
from ...readouts import Outputs
from ...search.objectives import CheckAnswers, Trial
from ...search.try_edits import ValPrompts
from ...settings import Settings
from ..base import Ids, Scored
from ..direction_scoring import Places
from .fits import ServedFits
from .model import ServedModel
from .scores import ServedScoring
from .trials import ServedTrials

MARGIN = 256  # tokens of an answer that the engine's context has room for after the longest prompt


class ServedReader:
    """A model in a vLLM engine, which starts when it is first needed.

    Args:
        source, weights: the checkpoint, and the SHA-256 of each of its weight files.
        settings: those of the extraction.
        positions: how many tokens of every prompt to store.
        out: the run folder.
    """

    name, generates = "vllm", True

    def __init__(
        self, source: Checkpoint, weights: dict[str, str], settings: Settings, positions: int, out: Path
    ) -> None:
        self.source, self.weights, self.settings = source, weights, settings
        self.positions, self.out = positions, out

    @cached_property
    def served(self) -> ServedModel:
        return ServedModel(self.source, self.settings.engine_options, self.settings.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.served.compute_dtype

    @property
    def vocabulary(self) -> int:
        return self.served.vocabulary

    @property
    def layer_count(self) -> int:
        return self.served.layer_count

    # prompts

    def outputs(self, ids: Ids, layers: Sequence[int] = (), later: Ids = ()) -> Outputs:
        """See `Reader`."""
        streams = self.served.streams(_longest([*ids, *later]))
        probabilities: list[torch.Tensor] = []
        found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        for portion in streams.read("scoring prompts", [Wanted(row) for row in ids], layers, outputs=LOGITS):
            probabilities += [logits[-1].softmax(-1) for logits in portion.outputs]
            for layer in layers:
                found[layer].append(portion.streams[layer][:, -1].float())
        result = torch.stack(probabilities)
        if not torch.isfinite(result).all():
            for _ in self._capture(ids, 1):  # its error names the block, if one is the cause
                pass
            raise OrthogonalizeError("the model's outputs contain NaN or infinite values; the checkpoint is damaged")
        return Outputs(result, {layer: torch.cat(parts) for layer, parts in found.items()})

    def record(self, sets: Mapping[str, Ids], inputs: Any) -> None:
        """See `Reader`."""
        record_with(
            self._capture, (self.dtype, self.served.width), sets, self.positions, self.layer_count + 1, self.out,
            [inputs, self.name],
        )  # fmt: skip

    def _capture(self, ids: Ids, positions: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """What `activations.capture` yields."""
        check_lengths(ids, positions)
        layers = range(self.layer_count + 1)
        wanted = [Wanted(row) for row in ids]
        for portion in self.served.streams(_longest(ids)).read("reading activations", wanted, layers, positions):
            for layer in layers:
                check_finite(layer, portion.streams[layer])
            yield list(portion.rows), torch.stack([portion.streams[layer] for layer in layers], 2)

    def answers(self, ids: list[list[int]], tokens: int, advance: Callable[[int], None]) -> list[list[int]]:
        """See `Reader`."""
        engine = self.served.engine(max(map(len, ids)) + tokens)
        found: list[list[int]] = []
        for start in range(0, len(ids), SLICE):
            part = ids[start : start + SLICE]
            found += engine.answers_slice(part, tokens)
            advance(len(part))
        return found

    # selection

    def score(
        self, positive: Ids, negative: Ids, finders: Sequence[str], everywhere: bool, given: Scored
    ) -> list[Candidate]:
        layer_norm = architecture_of(self.source.config).norms.kind == "layer"
        scoring = ServedScoring(
            self.served.streams(_longest([*positive, *negative])),
            {"positive": positive, "negative": negative},
            given.directions,
            given.readout,
            everywhere,
            given.places or Places.of(given.directions.positions, self.layer_count),
            layer_norm,
        )
        return scoring.score(finders, given.journal)

    def try_edits(
        self, budget: int, prompts: ValPrompts, ranked: Sequence[Candidate], given: Scored, left: CheckAnswers
    ) -> list[Trial]:
        fits = ServedFits(self.served, self.out, given.directions, self.weights)
        _announce(fits)
        trials = ServedTrials(
            self.served, self.source, given.directions, ranked, given.readout, self.answers, given.journal
        )
        return trials.run(budget, prompts, fits, left)

    def close(self) -> None:
        """See `Reader`."""
        self.served.close()


def _announce(fits: ServedFits) -> None:
    """Say which conditional edits are not tried, if any."""
    if not fits.seen:
        note("vLLM does not show what this model's blocks take in, so no conditional edits are tried")
    elif len(fits.seen) == 1:
        shown, hidden = ("attention", "MLPs") if fits.seen == ["attn"] else ("MLPs", "attention")
        note(f"vLLM does not show what this model's {hidden} take in, so conditional edits are of its {shown} only")


def _longest(ids: Ids) -> int:
    """The context that the prompts need with an answer."""
    return max(map(len, ids)) + MARGIN
