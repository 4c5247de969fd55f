"""What the wanted outputs of a model say, measured where they are: whole distributions never leave the worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...models.logprobs import exact_kl, smoothed_kl
from .step import Token

NUMBERS = 2**23  # logits that are measured at a time: 64 MiB of each of a few copies in float64
MEASURES = ("share", "smoothed_kl", "exact_kl", "logprob", "base_logprob")


class OutputStore:
    """The last hidden states at wanted tokens, until their logits are taken, and the base's logits to compare with.

    Args:
        model: vLLM's module of the whole model.
        vocabulary: the number of its tokens.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.hidden: list[torch.Tensor] = []
        self.tokens: list[Token] = []
        self.base: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, hidden: torch.Tensor, tokens: Sequence[Token]) -> None:
        """Add last hidden states [tokens, d]."""
        self.hidden.append(hidden)
        self.tokens += tokens

    def clear(self) -> None:
        """Forget what was added, but not the base's logits."""
        self.hidden, self.tokens = [], []

    def forget_base(self) -> None:
        """Forget the base's logits."""
        self.base = {}

    @torch.inference_mode()
    def logits(self) -> Iterator[tuple[list[Token], torch.Tensor]]:
        """Take the logits [tokens, vocabulary] of what was added, a part at a time; nothing where another worker has
        them.

        All workers of a tensor-parallel group must call it.
        """
        hidden, tokens = self.hidden, self.tokens
        self.clear()
        if not hidden:
            return
        rows = max(1, NUMBERS // self.vocabulary)
        for start, part in enumerate(torch.split(torch.cat(hidden), rows)):
            found = self.model.compute_logits(part)
            if found is not None:
                yield tokens[start * rows : start * rows + len(part)], found

    def measures(self, behaviour: Sequence[int], keep: bool, along: bool) -> tuple[list[Token], torch.Tensor]:
        """Take the `MEASURES` [tokens, 5] of what was added, in float64.

        `share` is the probability of the tokens `behaviour`; the KLs, in nats, are from the base's distribution at the
        same position of the same base row; `logprob` and `base_logprob` are of the token that follows in the prompt.
        What has no base, or no next token, is NaN, and so is the KL that is not asked for: each costs more than the
        logits.

        Args:
            keep: whether this is the base, whose logits are kept (on the host) for later calls.
            along: whether to take the exact KL, as along answers; else the smoothed one, of first tokens.
        """
        tokens: list[Token] = []
        parts = [torch.empty(0, len(MEASURES), dtype=torch.float64)]
        for some, logits in self.logits():
            if keep:
                self.base |= {token.base_place: row for token, row in zip(some, logits.cpu(), strict=True)}
            parts.append(self._measured(some, logits, behaviour, along))
            tokens += some
        return tokens, torch.cat(parts)

    def _measured(
        self, tokens: Sequence[Token], logits: torch.Tensor, behaviour: Sequence[int], along: bool
    ) -> torch.Tensor:
        logprobs = logits.float().log_softmax(-1)
        found = torch.full((len(tokens), len(MEASURES)), torch.nan, dtype=torch.float64)
        found[:, 0] = logprobs[:, list(behaviour)].exp().double().sum(-1).cpu()
        found[:, 3] = _of_next(logprobs, tokens)
        compared = [number for number, token in enumerate(tokens) if token.base_place in self.base]
        if compared:
            base = torch.stack([self.base[tokens[number].base_place] for number in compared]).to(logits.device)
            before, after = base.float().log_softmax(-1), logprobs[compared]
            found[compared, 4] = _of_next(before, [tokens[number] for number in compared])
            if along:
                found[compared, 2] = exact_kl(before, after).cpu()
            else:
                found[compared, 1] = smoothed_kl(before.exp(), after.exp()).cpu()
        return found


def _of_next(logprobs: torch.Tensor, tokens: Sequence[Token]) -> torch.Tensor:
    """The log-probability of each token's successor; NaN where it has none."""
    following = torch.tensor([token.following for token in tokens], device=logprobs.device)
    found = logprobs.gather(-1, following.clamp(min=0)[:, None])[:, 0].double()
    return torch.where(following >= 0, found, torch.nan).cpu()
