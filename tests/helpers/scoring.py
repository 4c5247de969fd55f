"""References for scores: prompts, probabilities from transformers alone, directions of a tiny model."""

from __future__ import annotations

import torch

from orthogonalize.directions.direction_set import Directions
from orthogonalize.directions.inlp.nullspace import inlp
from orthogonalize.directions.leace import leace
from orthogonalize.models.activations import all_activations

from .llama import VOCABULARY


def some_ids(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def plain_probabilities(model, ids) -> torch.Tensor:
    """First-token probabilities, one prompt at a time, from transformers alone."""
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([row])).logits[0, -1].float().softmax(-1) for row in ids])


def directions_of(model, positive, negative) -> Directions:
    """Directions of all three methods at two positions, as extraction finds them."""
    sides = [all_activations(model, ids, 2) for ids in (positive, negative)]
    eraser = leace(*sides)
    found = {((-2, -1)[i], layer): s for (i, layer), s in inlp(*sides, 3, min_accuracy=0.0).items()}
    return Directions((-2, -1), eraser.u, found, eraser.mean, eraser.v)
