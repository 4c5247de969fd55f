"""The transformers engine, which defines the results that others are checked against."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from ..core.errors import InPlaceError
from ..core.progress import track
from ..models.generation import generate, stop_tokens, stream
from ..models.loading import load_model
from ..models.logprobs import Completion, Likeliest, completion_scores, likeliest_tokens, next_token_logprobs
from .base import LIKELIEST, EngineOptions, Ids, Part, fingerprint


def open_transformers(folder: Path, tokenizer: Any, max_model_len: int, options: EngineOptions) -> TransformersEngine:
    """`TransformersEngine` on a checkpoint; it needs no limit on the context."""
    return TransformersEngine(folder, tokenizer, options.device)


def single_tokens(choices: Sequence[Ids]) -> bool:
    """Whether the choices of a question are distinct single tokens, so that one forward pass scores them all."""
    return all(len(c) == 1 for c in choices) and len({c[0] for c in choices}) == len(choices)


class TransformersEngine:
    """A transformers model in this process."""

    def __init__(self, folder: Path, tokenizer: Any, device: str = "auto", batch: int = 32) -> None:
        self.folder, self.tokenizer, self.device, self.batch = folder, tokenizer, device, batch
        self.model: Any = None

    def __enter__(self) -> Self:
        self.model = load_model(self.folder, self.device)
        return self

    def __exit__(self, *exc: object) -> None:
        self.model = None
        gc.collect()

    def answers(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[list[int]]:
        with track("answering", len(prompts), "prompts") as advance:
            stops = stop_tokens(self.model, self.tokenizer)
            return generate(self.model, prompts, max_new_tokens, stops, self.batch, advance)

    def stream(self, prompt: Ids, max_new_tokens: int, show: Callable[[list[int]], object]) -> list[int]:
        """The answer to one prompt; `show` gets all of its tokens so far at each."""
        return stream(self.model, prompt, max_new_tokens, stop_tokens(self.model, self.tokenizer), show)

    def scores(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Completion]:
        with track("scoring completions", len(prompts), "texts") as advance:
            return completion_scores(self.model, prompts, completions, advance)

    def choices(self, contexts: Sequence[Ids], choices: Sequence[Sequence[Ids]]) -> list[list[float]]:
        result: list[list[float]] = [[] for _ in contexts]
        one = [i for i, c in enumerate(choices) if single_tokens(c)]
        more = [i for i, c in enumerate(choices) if not single_tokens(c)]
        with track("scoring choices", len(contexts), "questions") as advance:
            ids = [[c[0] for c in choices[i]] for i in one]
            for i, found in zip(
                one, next_token_logprobs(self.model, [contexts[i] for i in one], ids, advance), strict=True
            ):
                result[i] = found
            for i in more:
                scores = completion_scores(self.model, [contexts[i]] * len(choices[i]), choices[i])
                result[i] = [score.logprob for score in scores]
                advance(1)
        return result

    def likeliest(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Likeliest]:
        with track("reading distributions", len(prompts), "prompts") as advance:
            return likeliest_tokens(self.model, prompts, completions, LIKELIEST, advance)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        parameters = dict(self.model.named_parameters())
        missing = sorted(set(weights) - set(parameters))
        if missing:
            raise InPlaceError(f"transformers has no parameter named {missing[0]}, so it cannot be replaced in place")
        for name, make in weights.items():
            parameters[name].copy_(make())

    def fingerprint(self, part: Part = "all") -> str:
        return fingerprint(self.model, part)
