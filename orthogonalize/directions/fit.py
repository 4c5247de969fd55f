"""Fit directions to stored activations, one group of layers at a time (the `directions` stage of `extract`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core.progress import track
from ..data.prompts import SIDES
from .activation_store import Recording
from .direction_set import Directions
from .finders.registry import FINDERS
from .inlp.nullspace import Classifier, Solver, Subspace
from .means import ARITHMETIC, find_mean
from .orthogonal import orthogonal_to_harmless_mean
from .stability import split_half_cosines

# Memory for a group of layers: the activations, in float64, of as many layers as fit.
BUDGET = 512 * 2**20


@dataclass(frozen=True)
class DirectionSettings:
    """The settings of the finders.

    `seeds` is how often the prompts are halved to measure stability. `max_rank`, `solver` and `classifier` are those
    of `inlp`, `mean` is that of `dim` (see `means.find_mean`). With `orthogonal_to`, directions are
    made orthogonal to the harmless mean (see `orthogonal`).
    """

    finders: tuple[str, ...]
    max_rank: int | None
    solver: Solver
    classifier: Classifier
    seed: int
    seeds: int
    mean: str = ARITHMETIC
    orthogonal_to: str | None = None


def find_directions(
    recording: Recording,
    positions: tuple[int, ...],
    layers: int,
    settings: DirectionSettings,
    device: torch.device,
    *,
    layer_norm: bool = False,
) -> Directions:
    """Run the finders of `settings` on the train prompts, at every position and layer.

    Finders that need only arithmetic means (diff-in-means) read a few prompts at a time, so that memory does not grow
    with the number of prompts. Robust means need all prompts of a side, but only one layer at a time. LEACE is fitted
    to arithmetic means in any case.

    Args:
        positions: the positions in the recording, counted from the end of the prompt.
        layers: number of streams in the recording (blocks + 1).
        layer_norm: whether the model has LayerNorms (see `orthogonal_to_harmless_mean`).

    Raises:
        OrthogonalizeError: nothing is left of a finder's directions once they are orthogonal to the harmless mean.
    """
    diffs, means, negatives, arithmetic_diffs = [], [], [], []
    subspaces: dict[tuple[int, int], Subspace] = {}
    tensors: dict[str, list[torch.Tensor]] = {}
    finders = [FINDERS.find(name) for name in settings.finders]
    streamed = settings.seeds == 1 and not any(finder.needs_samples for finder in finders)
    cosines: dict[str, list[torch.Tensor]] = {}
    with track("directions", layers, "layers") as advance:
        for group in _groups(recording, positions, layers, streamed):
            for layer in group:
                positive, negative = _side_means(recording, layer, ARITHMETIC, device)
                n, m = (recording.count(f"{side}.train") for side in SIDES)
                means.append((n * positive + m * negative) / (n + m))
                arithmetic_diffs.append(positive - negative)
                if settings.mean != ARITHMETIC:
                    positive, negative = _side_means(recording, layer, settings.mean, device)
                diffs.append(positive - negative)
                negatives.append(negative)
            if not streamed:
                sides = [_read_layers(recording, f"{side}.train", group, device) for side in SIDES]
                for finder in finders:
                    fitted = finder.fit(sides[0], sides[1], settings)
                    subspaces |= {(positions[i], group[j]): found for (i, j), found in fitted.subspaces.items()}
                    for key, tensor in fitted.tensors.items():
                        tensors.setdefault(f"{finder.name}.{key}", []).append(tensor.cpu())
                if settings.seeds > 1:
                    for name, value in _stability(recording, group, settings, device).items():
                        cosines.setdefault(name, []).append(value)
            advance(len(group))
    joined = {key: torch.cat(parts, dim=1) for key, parts in tensors.items()}
    readers = joined.pop("leace.readers", None)
    other_means = readers is not None and settings.mean != ARITHMETIC
    directions = Directions(
        positions,
        torch.stack(diffs, dim=1),
        subspaces,
        torch.stack(means, dim=1),
        readers,
        {name: torch.cat(parts, dim=-1) for name, parts in cosines.items()},
        joined,
        negative_means=torch.stack(negatives, dim=1),
        leace_differences=torch.stack(arithmetic_diffs, dim=1) if other_means else None,
    )
    return orthogonal_to_harmless_mean(directions, layer_norm) if settings.orthogonal_to else directions


def _side_means(recording: Recording, layer: int, mean: str, device: torch.device) -> list[torch.Tensor]:
    """The mean [positions, d] of the positive and of the negative train prompts at a layer, on the CPU."""
    if mean == ARITHMETIC:
        return [recording.mean(f"{side}.train", layer) for side in SIDES]
    average = find_mean(mean)
    return [average(recording.read(f"{side}.train", layer).to(device)).cpu() for side in SIDES]


def _groups(recording: Recording, positions: Sequence[int], layers: int, streamed: bool) -> list[range]:
    if streamed:
        return [range(layer, layer + 1) for layer in range(layers)]
    prompts = sum(recording.count(f"{side}.{split}") for side in SIDES for split in ("train", "spare"))
    width = recording.read("positive.train", 0, slice(0, 1)).shape[-1]
    size = max(1, BUDGET // (8 * prompts * len(positions) * width))
    return [range(start, min(start + size, layers)) for start in range(0, layers, size)]


def _read_layers(recording: Recording, name: str, layers: range, device: torch.device) -> torch.Tensor:
    """The activations [prompts, positions, layers, d] of a set."""
    return torch.stack([recording.read(name, layer) for layer in layers], dim=2).to(device)


def _stability(
    recording: Recording, layers: range, settings: DirectionSettings, device: torch.device
) -> dict[str, torch.Tensor]:
    """By finder, cosines [draws, positions, layers] between independent draws of train and spare prompts."""
    pools, own = [], []
    for side in SIDES:
        train, spare = (_read_layers(recording, f"{side}.{split}", layers, device) for split in ("train", "spare"))
        pools.append(torch.cat([train, spare]))
        own.append(len(train))
    return split_half_cosines(pools, own, settings)
