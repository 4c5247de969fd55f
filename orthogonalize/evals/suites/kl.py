"""KL(base || model) on harmless prompts: of the first token, and along the base's own answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...engines.base import Responder
from ...models.logprobs import Likeliest
from ..metrics import Series
from .base import BaseOutputs

ALONG = 32  # tokens of an answer


def kl_bound(base: Likeliest, model: Likeliest) -> torch.Tensor:
    """KL(base || model) in nats at every position, from below: [tokens].

    Each side gives its k likeliest tokens. Tokens that the base does not list count as one (joining
    outcomes can only lower a KL); one that the base lists and the model does not is given the least
    probability that the model lists, which is at least what it has. Exact where k is the vocabulary; else
    short of the truth by what the edit moves among tokens that the base hardly uses.
    """
    bounds = []
    for ids, p, other, q in zip(base.ids, base.logprobs, model.ids, model.logprobs, strict=True):
        order = other.argsort()
        place = torch.searchsorted(other[order], ids).clamp(max=len(other) - 1)
        found = other[order][place] == ids
        floor = q.min()
        here = torch.where(found, q[order][place], floor)
        rest = (1 - p.exp().sum()).clamp(min=0.0)
        other_rest = (1 - here[found].exp().sum()).clamp(min=1e-12)
        tail = rest * (rest / other_rest).log() if rest > 1e-9 else rest.new_zeros(())
        bounds.append((p.exp() * (p - here)).sum() + tail)
    return torch.stack(bounds).clamp(min=0.0)


@dataclass(frozen=True)
class Divergences:
    """KL of the first answer token, and of the first `ALONG` tokens of the base's answers."""

    longest: int
    state: str  # that of the base's answers
    name: str = "kl"

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """The base leaves its distributions in `memory`; those measured later are compared with them."""
        completions = [answer[:ALONG] for answer in memory.own]
        found = engine.likeliest(memory.own_prompts, completions)
        if not memory.distributions:
            memory.distributions = found
        kls = [kl_bound(p, q) for p, q in zip(memory.distributions, found, strict=True)]
        return {
            "kl.first_token": Series(kind="divergence", values=[kl[0].item() for kl in kls], tokens=[1] * len(kls)),
            "kl.completions": Series(
                kind="divergence", values=[kl.sum().item() for kl in kls], tokens=[len(kl) for kl in kls]
            ),
        }
