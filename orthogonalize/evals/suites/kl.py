"""Suite `kl`: KL(base || model) on harmless prompts, at the first token and along the base's own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..metrics import Series
from .base import BaseOutputs, SuiteContext, SuiteEntry

if TYPE_CHECKING:
    import torch

    from ...engines.base import Responder
    from ...models.logprobs import Likeliest

ALONG = 32  # tokens of each answer


def kl_bound(base: Likeliest, model: Likeliest) -> torch.Tensor:
    """A lower bound on KL(base || model) in nats at every position: [tokens].

    Each side lists its k likeliest tokens. Tokens that the base does not list count as one outcome (merging outcomes
    can only lower a KL); a token that the base lists and the model does not gets the lowest probability that the model
    lists, which is at least its own. The bound is exact if k is the size of the vocabulary; otherwise it misses what
    the edit moves among tokens that the base rarely uses.
    """
    import torch

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
    """KL of the first answer token, and of the first `ALONG` tokens of the base's answers.

    `state` is the fingerprint of the harmless prompts and the answers' length limit.
    """

    longest: int
    state: str
    name: str = "kl"

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """The base stores its distributions in `memory`; later models are compared with them."""
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


def divergences(context: SuiteContext) -> Divergences:
    """The suite for the harmless prompts of a run."""
    return Divergences(context.base_answers.longest, context.base_answers.states["harmless"])


ENTRIES = (
    SuiteEntry(
        "kl",
        "KL(base, edited): first token, and along 32 tokens of the base's answers to harmless prompts",
        {"kl.first_token": "KL to base, first token", "kl.completions": "KL to base, along own answers"},
        divergences,
        needs="base answers",
        columns=("kl.completions",),
    ),
)
