"""Read the residual stream: block inputs at the last tokens of each prompt, without running the head.

Prompts are padded on the right: under causal attention no token attends to later padding, so neither an attention
mask nor position ids are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..core.errors import OrthogonalizeError
from ..core.progress import Progress
from .forward.block_inputs import capturing_inputs
from .forward.prefix import read_prefix, shared_length
from .stream import Stream

TOKENS_PER_BATCH = 4096


def batches(ids: Sequence[Sequence[int]], tokens: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Indices into `ids` in batches of similar length, each of at most `tokens` tokens after padding."""
    group: list[int] = []
    for index in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if group and len(ids[index]) * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def pad(ids: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`ids` as a right-padded tensor [batch, tokens], and their lengths [batch]."""
    lengths = torch.tensor([len(row) for row in ids], device=device)
    padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long, device=device)
    for row, values in zip(padded, ids, strict=True):
        row[: len(values)] = torch.tensor(values, device=device)
    return padded, lengths


def last_tokens(hidden: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
    """Hidden states of the last `count` tokens before the padding: [batch, tokens, d] to [batch, count, d]."""
    index = lengths.to(hidden.device)[:, None] - count + torch.arange(count, device=hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], index]


def check_lengths(ids: Sequence[Sequence[int]], positions: int) -> None:
    """Check that every prompt has at least `positions` tokens.

    Raises:
        OrthogonalizeError: one is shorter.
    """
    short = min(len(row) for row in ids)
    if short < positions:
        raise OrthogonalizeError(f"a prompt has {short} tokens, fewer than the {positions} positions to read")


def check_finite(layer: int, hidden: torch.Tensor) -> None:
    """Check what enters block `layer`.

    Raises:
        OrthogonalizeError: a value is NaN or infinite.
    """
    if not torch.isfinite(hidden).all():
        source = f"block {layer - 1}" if layer else "the embedding"
        raise OrthogonalizeError(
            f"the activations at the input of layer {layer} contain NaN or infinite values, which {source} puts out; "
            "try --dtype float32, or check the checkpoint"
        )


@torch.inference_mode()
def capture(
    model: Any, ids: Sequence[Sequence[int]], positions: int, progress: Progress | None = None
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield (indices, activations [batch, positions, layers + 1, d]) for batches of prompts, in the model's dtype.

    Layer l is the input of block l; the last is the stream that the head's norm reads.

    Args:
        model: a transformers model.
        ids: the token ids of each prompt.
        positions: how many tokens are read at the end of each prompt.
        progress: called with the number of prompts in each batch.

    Raises:
        OrthogonalizeError: an activation is NaN or infinite, or a prompt has fewer tokens than `positions`.
    """
    check_lengths(ids, positions)
    decoder = Stream.of(model).decoder
    shared = shared_length(model, ids, positions)
    prefix = read_prefix(model, ids[0][:shared])
    for group in batches(ids):
        padded, lengths = pad([ids[i][shared:] for i in group], model.device)
        taken: list[torch.Tensor] = []

        def take(
            layer: int, hidden: torch.Tensor, lengths: torch.Tensor = lengths, taken: list[torch.Tensor] = taken
        ) -> None:
            here = last_tokens(hidden, lengths, positions)
            check_finite(layer, here)
            taken.append(here.to(model.device))  # blocks may be on several devices

        with capturing_inputs(model, take):
            decoder(input_ids=padded, **prefix.before(len(group)))
        yield group, torch.stack(taken, dim=2)
        if progress:
            progress(len(group))


def mean_activations(
    model: Any, ids: Sequence[Sequence[int]], positions: int, progress: Progress | None = None
) -> torch.Tensor:
    """Mean over prompts, [positions, layers + 1, d], summed in float64; memory use does not depend on their number."""
    total: torch.Tensor | None = None
    for _, part in capture(model, ids, positions, progress):
        summed = part.to("cpu", torch.float64).sum(0)
        total = summed if total is None else total + summed
    assert total is not None
    return total / len(ids)


def all_activations(
    model: Any, ids: Sequence[Sequence[int]], positions: int, progress: Progress | None = None
) -> torch.Tensor:
    """The activations of all prompts in float32, [prompts, positions, layers + 1, d], in the order of `ids`."""
    result: torch.Tensor | None = None
    for group, part in capture(model, ids, positions, progress):
        if result is None:
            result = torch.empty(len(ids), *part.shape[1:])
        result[group] = part.to("cpu", torch.float32)
    assert result is not None
    return result
