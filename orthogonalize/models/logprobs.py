"""Log-probabilities from a transformers model: of completions, of the likeliest tokens and of single tokens.

Also how far next-token distributions are from each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.progress import Progress
from .activations import batches, pad
from .forward.logits import logits_at
from .forward.prefix import Prefix, read_prefix, shared_length

SMOOTHING = 1e-6  # added to probabilities inside the logarithms of `smoothed_kl`


@dataclass(frozen=True)
class Completion:
    """A completion's total log-probability in nats, and whether greedy decoding produces it."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Likeliest:
    """The k likeliest next tokens at each position of a completion: `ids` and `logprobs`, [tokens, k]."""

    ids: torch.Tensor
    logprobs: torch.Tensor

    def rows(self) -> list[list[list[float]]]:
        """As plain lists for JSON: ids, then log-probabilities rounded to six digits."""
        return [self.ids.tolist(), [[round(v, 6) for v in row] for row in self.logprobs.tolist()]]

    @classmethod
    def of(cls, rows: Sequence[Any]) -> Likeliest:
        """The inverse of `rows`."""
        return cls(torch.tensor(rows[0], dtype=torch.long), torch.tensor(rows[1], dtype=torch.float64))


@torch.inference_mode()
def completion_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    progress: Progress | None = None,
    prefix: Prefix | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (index, log-probabilities [tokens of the completion, vocabulary]) for each completion, in any order.

    They are float32, on the model's device. `prefix` is what all prompts begin with in the model as it is now; by
    default it is read.
    """
    rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    if prefix is None:
        prefix = read_prefix(model, prompts[0][: shared_length(model, prompts)]) if prompts else Prefix()
    shared = len(prefix)
    for group in batches(rows, tokens=2048):
        padded, _ = pad([rows[i][shared:] for i in group], model.device)
        start = min(len(prompts[i]) for i in group) - 1 - shared
        logits = logits_at(model, padded, padded.shape[1] - start, **prefix.before(len(group)))
        for row, i in enumerate(group):
            first, last = len(prompts[i]) - 1 - shared, len(rows[i]) - 1 - shared
            yield i, logits[row, first - start : last - start].float().log_softmax(-1)
        if progress:
            progress(len(group))


def completion_scores(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> list[Completion]:
    """Score each of `completions` after its prompt (all as token ids)."""
    result = [Completion(0.0, True)] * len(prompts)
    for i, logprobs in completion_logprobs(model, prompts, completions, progress):
        target = torch.tensor(completions[i], device=logprobs.device, dtype=torch.long)
        total = logprobs.gather(-1, target[:, None]).sum().item()
        result[i] = Completion(total, bool((logprobs.argmax(-1) == target).all()))
    return result


def likeliest_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    count: int,
    progress: Progress | None = None,
) -> list[Likeliest]:
    """The `count` likeliest tokens at each position of each completion."""
    nothing = Likeliest(torch.empty(0, 0, dtype=torch.long), torch.empty(0, 0))
    result = [nothing] * len(prompts)
    for i, logprobs in completion_logprobs(model, prompts, completions, progress):
        top = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
        result[i] = Likeliest(top.indices.cpu(), top.values.double().cpu())
    return result


def next_token_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]], progress: Progress | None = None
) -> list[list[float]]:
    """The log-probability, as the next token, of each of a prompt's `candidates` (token ids)."""
    result: list[list[float]] = [[] for _ in prompts]
    for i, logprobs in completion_logprobs(model, prompts, [ids[:1] for ids in candidates], progress):
        result[i] = logprobs[0, list(candidates[i])].tolist()
    return result


def exact_kl(base: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """KL(base || edited) in nats, from log-probabilities [..., vocabulary]; summed in float64."""
    p = base.double()
    weight = p.exp()
    terms = weight * (p - edited.double())
    return torch.where(weight > 0, terms, 0.0).sum(-1).clamp(min=0.0)  # tokens that the base rules out add nothing


def smoothed_kl(base: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """The score of eliroc98/refusal_direction for how far probabilities over the last axis moved, in nats.

    `sum p (log(p + 1e-6) - log(q + 1e-6))` of the base's p and the edited model's q. It ranks directions as the
    reference does, but is a KL only up to the constant: where q is far below 1e-6 it is too low, and it can be slightly
    negative. Whole edits are compared by the exact KL (see `drift`).
    """
    p, q = base.double(), edited.double()
    return (p * ((p + SMOOTHING).log() - (q + SMOOTHING).log())).sum(-1)
