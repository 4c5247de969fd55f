"""Greedy generation with a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..core.progress import Progress


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The token ids that end an answer, from the generation config and the tokenizer."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    ids = declared if isinstance(declared, list) else [declared]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


@contextmanager
def _greedy(model: Any, max_new_tokens: int, stops: Sequence[int]) -> Iterator[None]:
    """Replace the model's generation config by plain greedy decoding.

    The model's own may penalize repetition, which other engines do not, and supplies what a call leaves out.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stops), pad_token_id=stops[0] if stops else 0
    )
    try:
        yield
    finally:
        model.generation_config = own


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

    Prompts are padded on the left, with an attention mask.

    Args:
        model: a transformers model.
        ids: the token ids of each prompt.
        max_new_tokens: per prompt.
        stops: token ids that end a completion.
        batch: how many prompts are run together.
        progress: called with the number of prompts in each batch.
    """
    result: list[list[int]] = [[] for _ in ids]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        width = max(len(ids[i]) for i in group)
        padded = torch.tensor([[0] * (width - len(ids[i])) + list(ids[i]) for i in group], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in group], device=model.device)
        with _greedy(model, max_new_tokens, stops):
            output = model.generate(input_ids=padded, attention_mask=mask)
        for i, row in zip(group, output[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(row) if token in stops), len(row))
            result[i] = row[:end]
        if progress:
            progress(len(group))
    return result


class _Listener:
    """Collects one answer, token by token, as transformers' `generate` makes them."""

    def __init__(self, stops: Sequence[int], show: Callable[[list[int]], object]) -> None:
        self.stops, self.show = stops, show
        self.answer: list[int] | None = None  # the prompt comes first

    def put(self, tokens: torch.Tensor) -> None:
        if self.answer is None:
            self.answer = []
        elif (token := int(tokens.flatten()[0])) not in self.stops:
            self.answer.append(token)
            self.show(list(self.answer))

    def end(self) -> None:
        pass


@torch.inference_mode()
def stream(
    model: Any, ids: Sequence[int], max_new_tokens: int, stops: Sequence[int], show: Callable[[list[int]], object]
) -> list[int]:
    """The greedy completion of one prompt, as `generate` gives it; `show` gets all of its tokens so far at each."""
    prompt = torch.tensor([list(ids)], device=model.device)
    listener = _Listener(stops, show)
    with _greedy(model, max_new_tokens, stops):
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=listener)
    return listener.answer or []
