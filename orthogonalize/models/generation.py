"""Greedy generation with a transformers model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..core.progress import Progress
from .forward.prefix import shared_length
from .stream import Stream

# The most prompts, and tokens of prompts and answers, that are generated together: fewer take longer, more take memory.
MOST_ROWS, MOST_TOKENS = 64, 16384


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
    batch: int | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Greedy completions as token ids, without the stop token, in the order of `ids`.

    What all prompts begin with is computed once, where the model can share it; what follows is padded on the left, with
    an attention mask.

    Args:
        model: a transformers model.
        ids: the token ids of each prompt.
        max_new_tokens: per prompt.
        stops: token ids that end a completion.
        batch: how many prompts are run together; None: as many as keep the keys and values small.
        progress: called with the number of prompts in each batch.
    """
    result: list[list[int]] = [[] for _ in ids]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    longest = max(map(len, ids), default=0)
    shared = shared_length(model, ids) if longest + max_new_tokens <= _shareable(model) else 0
    beginning = list(ids[0][:shared]) if shared else []
    begun = _begun(model, beginning)
    batch = batch or max(1, min(MOST_ROWS, MOST_TOKENS // max(1, longest + max_new_tokens)))
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        width = max(len(ids[i]) for i in group)
        gaps = [width - len(ids[i]) for i in group]
        rows = [[*beginning, *[0] * gap, *ids[i][shared:]] for i, gap in zip(group, gaps, strict=True)]
        mask = [[*[1] * shared, *[0] * gap, *[1] * (width - gap - shared)] for gap in gaps]
        with _greedy(model, max_new_tokens, stops):
            output = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                past_key_values=_repeated(begun, len(group)),
            )
        for i, row in zip(group, output[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(row) if token in stops), len(row))
            result[i] = row[:end]
        if progress:
            progress(len(group))
    return result


def _shareable(model: Any) -> float:
    """The length up to which answers may follow a shared beginning.

    Padding after the beginning would take up room in a sliding window. Image-text models compute positions from whole
    rows.
    """
    config = model.config
    if config.get_text_config() is not config:
        return 0
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min([size for size in found if size], default=math.inf)


def _begun(model: Any, tokens: Sequence[int]) -> Any:
    """The keys and values of one row that begins with `tokens`; None without tokens."""
    from transformers import DynamicCache

    if not tokens:
        return None
    decoder = Stream.of(model).decoder
    cache = DynamicCache(config=decoder.config)
    decoder(input_ids=torch.tensor([list(tokens)], device=model.device), past_key_values=cache, use_cache=True)
    return cache


def _repeated(cache: Any, rows: int) -> Any:
    if cache is None:
        return None
    own = copy.deepcopy(cache)  # to which `generate` adds
    own.batch_repeat_interleave(rows)
    return own


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
