"""Suite `kl`: KL(base || model) on harmless prompts and every preserved set.

It is measured at the first token and along the base's own answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..metrics import Series
from .base import HARMLESS, BaseOutputs, SuiteContext, SuiteEntry

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

    `state` is the fingerprint of the prompts and the answers' length limit.
    """

    longest: int
    state: str
    name: str = "kl"

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """The base stores its distributions in `memory`; later models are compared with them."""
        result = {}
        for name, own in memory.own.items():
            found = engine.likeliest(own.prompts, [answer[:ALONG] for answer in own.answers])
            base = memory.distributions.setdefault(name, found)
            kls = [kl_bound(p, q) for p, q in zip(base, found, strict=True)]
            place = "kl" if name == HARMLESS else f"kl.sets.{name}"
            result[f"{place}.first_token"] = Series(
                kind="divergence", values=[kl[0].item() for kl in kls], tokens=[1] * len(kls)
            )
            result[f"{place}.completions"] = Series(
                kind="divergence", values=[kl.sum().item() for kl in kls], tokens=[len(kl) for kl in kls]
            )
        return result


def divergences(context: SuiteContext) -> Divergences:
    """The suite for the harmless and preserved prompts of a run."""
    return Divergences(context.base_answers.longest, context.base_answers.scored_again_state)


ENTRIES = (
    SuiteEntry(
        "kl",
        "KL(base, edited), harmless prompts and preserved sets: first token, and along 32 tokens of the base's answers",
        {"kl.first_token": "KL to base, first token", "kl.completions": "KL to base, along own answers"},
        divergences,
        needs="base answers",
        columns=("kl.completions",),
    ),
)
