"""Suite `loss`: cross-entropy of the base model's own answers to harmless prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import BaseOutputs, SuiteContext, SuiteEntry
from .text_losses import cross_entropy

if TYPE_CHECKING:
    from ...engines.base import Responder
    from ..metrics import Series


@dataclass(frozen=True)
class OwnLoss:
    """The base's answers scored by every model: how much less likely an edit makes what the base would say.

    `state` is the fingerprint of the harmless prompts and the answers' length limit.
    """

    longest: int
    state: str
    name: str = "loss"

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """Score the answers in `memory`."""
        return {"loss.own_completions": cross_entropy(engine, memory.own_prompts, memory.own)}


def own_loss(context: SuiteContext) -> OwnLoss:
    """The suite for the harmless prompts of a run."""
    return OwnLoss(context.base_answers.longest, context.base_answers.states["harmless"])


ENTRIES = (
    SuiteEntry(
        "loss",
        "cross-entropy of the base's own answers to harmless prompts",
        {"loss.own_completions": "cross-entropy, own answers"},
        own_loss,
        needs="base answers",
    ),
)
