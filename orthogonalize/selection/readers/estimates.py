"""What removing or adding a direction does to the behaviour, to first order: two gradients tell of all directions.

To first order, an edit changes the behaviour score of a prompt by the gradient of the score with respect to what
passes, times what the edit changes there. So one backward pass per side stands for a forward pass per direction. This
is attribution patching (Nanda 2023; Syed et al. 2023, arXiv 2310.10348) with maps of the stream in the place of
patches. Estimates only put directions into an order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.errors import first_line
from ...core.interventions import AffineMap
from ...core.progress import note
from ...data.prompts import Side
from ...models.activations import batches, last_tokens, pad
from ...models.gradients import TracedStream, traced
from ..readouts import FirstToken, Outputs, Readout, unbounded_log_odds
from ..scoring import last_logits

BATCH_TOKENS = 512  # in one backward pass, which keeps what all blocks compute
Ids = Sequence[Sequence[int]]


@dataclass
class _Passed:
    """What passes at one place of a block, and the gradients of the scores' sum there, each [tokens, d]."""

    values: list[torch.Tensor]
    gradients: list[torch.Tensor]

    def change(self, affine: AffineMap) -> float:
        """The change of the scores' sum by `affine`, to first order: `sum_t g_t . (M x_t - x_t)`."""
        total = 0.0
        for x, g in zip(self.values, self.gradients, strict=True):
            along = (x.float() @ affine.v.float()) * (g.float() @ affine.u.float())
            total += (g.float() @ affine.s.float()).sum().item() - along.sum().item()
        return total


class ScoreGradients:
    """The behaviour scores of some prompts, and their gradients at every block.

    Raises:
        RuntimeError: the model has no gradients, as some quantised ones, or they need too much memory.
    """

    def __init__(self, model: Any, ids: Ids, readout: Readout) -> None:
        self.count, self._total = len(ids), 0.0
        self._inputs: list[_Passed] = []
        self._outputs: list[_Passed] = []
        for group in batches(ids, BATCH_TOKENS):
            self._add(model, [ids[i] for i in group], readout)

    def _add(self, model: Any, rows: Ids, readout: Readout) -> None:
        padded, lengths = pad(rows, model.device)
        with traced(model) as stream:
            logits = last_logits(model, padded, lengths)
            scores = _scores(readout, logits, stream, lengths)
        layers = [len(outputs) for outputs in stream.outputs]
        places = [*stream.inputs[: len(layers)], *(each for outputs in stream.outputs for each in outputs)]
        found = torch.autograd.grad(scores.sum(), places, materialize_grads=True)
        self._total += scores.sum().item()
        flat = [t.detach().reshape(-1, t.shape[-1]).cpu() for t in (*places, *found)]
        values, gradients = flat[: len(places)], flat[len(places) :]
        if not self._inputs:
            self._inputs, self._outputs = ([_Passed([], []) for _ in layers] for _ in range(2))
        owners = [*self._inputs, *(self._outputs[layer] for layer, count in enumerate(layers) for _ in range(count))]
        for passed, value, gradient in zip(owners, values, gradients, strict=True):
            passed.values.append(value)
            passed.gradients.append(gradient)

    def projected(self, layer: int, affine: AffineMap) -> float:
        """The mean score with the input and both outputs of a block mapped (see `layer_projected`)."""
        change = self._inputs[layer].change(affine) + self._outputs[layer].change(affine.unshifted)
        return (self._total + change) / self.count

    def shifted(self, layer: int, shift: AffineMap) -> float:
        """The mean score with the input of a block shifted (see `input_shifted`)."""
        return (self._total + self._inputs[layer].change(shift)) / self.count


def _scores(readout: Readout, logits: torch.Tensor, stream: TracedStream, lengths: torch.Tensor) -> torch.Tensor:
    """The scores [prompts], with gradients also where a score has reached its bound."""
    if isinstance(readout, FirstToken):
        return unbounded_log_odds(logits, readout.tokens) - readout.threshold
    read = {layer: last_tokens(stream.inputs[layer], lengths, 1)[:, 0].float() for layer in readout.layers}
    return readout.scores(Outputs(logits.float().softmax(-1), read))


def score_gradients(model: Any, prompts: Mapping[Side, Ids], readout: Readout) -> dict[Side, ScoreGradients] | None:
    """The gradients of the scores of each side's prompts; None if the model gives none."""
    spread = getattr(model, "hf_device_map", {}).values()
    if {"cpu", "disk"} & {str(place) for place in spread} and len(set(spread)) > 1:
        return None  # weights that come and go would all be kept for the backward pass
    try:
        return {side: ScoreGradients(model, ids, readout) for side, ids in prompts.items()}
    except (RuntimeError, MemoryError) as error:  # kernels without a backward pass, or too little memory for one
        note(f"directions are screened without gradients ({first_line(error)})")
        return None
