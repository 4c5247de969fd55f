"""Greedy answers from a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Progress = Callable[[int], None]


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends an answer: the generation config's and the tokenizer's."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    ids = declared if isinstance(declared, list) else [declared]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


@torch.inference_mode()
def generate(
    model: Any,
    ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: Sequence[int],
    batch: int = 32,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Greedy completions as token ids, without the stop token, in the order of `ids`.

    Prompts are padded on the left, with mask and positions, as generation needs.
    """
    result: list[list[int]] = [[] for _ in ids]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        width = max(len(ids[i]) for i in group)
        padded = torch.tensor([[0] * (width - len(ids[i])) + list(ids[i]) for i in group], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in group], device=model.device)
        output = model.generate(
            input_ids=padded,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=list(stops),
            pad_token_id=stops[0] if stops else 0,
        )
        for i, row in zip(group, output[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(row) if token in stops), len(row))
            result[i] = row[:end]
        if progress:
            progress(len(group))
    return result
