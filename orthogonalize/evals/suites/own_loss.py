"""Suite `loss`: cross-entropy of the base model's own answers to harmless prompts and to every preserved set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import HARMLESS, BaseOutputs, SuiteContext, SuiteEntry
from .text_losses import cross_entropy

if TYPE_CHECKING:
    from ...engines.base import Responder
    from ..metrics import Series


@dataclass(frozen=True)
class OwnLoss:
    """The base's answers scored by every model: how much less likely an edit makes what the base would say.

    `state` is the fingerprint of the prompts and the answers' length limit.
    """

    longest: int
    state: str
    name: str = "loss"

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """Score the answers in `memory`."""
        return {
            "loss.own_completions" if name == HARMLESS else f"loss.sets.{name}": cross_entropy(
                engine, own.prompts, own.answers
            )
            for name, own in memory.own.items()
        }


def own_loss(context: SuiteContext) -> OwnLoss:
    """The suite for the harmless and preserved prompts of a run."""
    return OwnLoss(context.base_answers.longest, context.base_answers.scored_again_state)


ENTRIES = (
    SuiteEntry(
        "loss",
        "cross-entropy of the base's own answers to harmless prompts and preserved sets",
        {"loss.own_completions": "cross-entropy, own answers"},
        own_loss,
        needs="base answers",
    ),
)
