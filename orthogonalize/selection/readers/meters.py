"""Measure maps on val prompts, for the scores of single directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from ...core.interventions import AffineMap, shift
from ...data.prompts import Side
from ...models.logprobs import smoothed_kl
from ...models.stream import Stream
from ..readouts import Outputs, Readout
from ..scoring import LocalScorer, global_outputs


@dataclass(frozen=True)
class ScoredMaps:
    """A batch of maps whose effect on val prompts is to be measured.

    Attributes:
        side: whose prompts.
        maps: see `AffineMap`; with a batch dimension.
        layer: where they act; None at every write of the model.
        projected: whether they act on the block's input and both its outputs, otherwise only on its input.
    """

    side: Side
    maps: AffineMap
    layer: int | None
    projected: bool = True


class Meter(Protocol):
    """Measures maps on val prompts; each result is [maps, prompts]."""

    def behaviour(self, edits: ScoredMaps) -> torch.Tensor:
        """Behaviour scores, in log-odds."""
        ...

    def kl(self, edits: ScoredMaps) -> torch.Tensor:
        """`smoothed_kl` of the first token from the base's, in nats."""
        ...


class ResidentMeter:
    """Measures with a model that is whole in memory."""

    def __init__(self, model: Any, prompts: Mapping[Side, Sequence[Sequence[int]]], readout: Readout) -> None:
        self.model, self.prompts, self.readout = model, prompts, readout
        self.layer_count = Stream.of(model).layer_count
        self.local = {side: LocalScorer(model, ids, readout.layers) for side, ids in prompts.items()}

    def tokens(self, side: Side, prompts: int) -> float:
        """The tokens of a pass over so many prompts of a side (see `LocalScorer.tokens`)."""
        return self.local[side].tokens(prompts)

    @cached_property
    def base(self) -> torch.Tensor:
        """The first-token probabilities of the negative prompts, unedited."""
        nothing = shift(torch.zeros(1, Stream.of(self.model).architecture.width(self.model.config.to_dict())))
        return self.local["negative"].outputs(0, nothing, projected=False).probabilities[0]

    def behaviour(self, edits: ScoredMaps) -> torch.Tensor:
        return self.readout.scores(self._outputs(edits))

    def kl(self, edits: ScoredMaps) -> torch.Tensor:
        kept = self._outputs(edits).probabilities
        return smoothed_kl(self.base.expand_as(kept), kept)

    def _outputs(self, edits: ScoredMaps) -> Outputs:
        if edits.layer is None:
            ids, layers = self.prompts[edits.side], self.readout.layers
            return global_outputs(self.model, ids, edits.maps, self.layer_count, layers)
        return self.local[edits.side].outputs(edits.layer, edits.maps, edits.projected)
