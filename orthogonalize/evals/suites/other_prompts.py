"""Suite `other`: cross-entropy of the base model's own answers to prompts of quite other kinds than a contrast's.

The harmless prompts of a run resemble those that its edit was fitted on. These do not: code, arithmetic, translation,
other languages, reasoning, structured output, creative writing, rewriting. They ship with the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import OrthogonalizeError
from ...core.files import fingerprint
from ...data.benchmarks import evenly
from ...data.rows import read_rows
from .base import BaseOutputs, SuiteContext, SuiteEntry
from .text_losses import cross_entropy

if TYPE_CHECKING:
    from ...engines.base import Responder
    from ..metrics import Series

ANSWER_TOKENS = 48  # of each answer


def other_prompts() -> list[tuple[str, str]]:
    """(prompt, category) of every prompt."""
    file = Path(str(resources.files("orthogonalize.data"))) / "other_prompts.jsonl"
    return [(row["prompt"], row["category"]) for row in read_rows(file)]


@dataclass(frozen=True)
class OtherLoss:
    """The base's answers to `prompts` (token ids), of one category each, scored by every model."""

    prompts: list[list[int]]
    categories: list[str]
    name: str = "other"

    @property
    def longest(self) -> int:
        return max(map(len, self.prompts)) + ANSWER_TOKENS

    @cached_property
    def state(self) -> str:
        return fingerprint([self.prompts, self.categories, ANSWER_TOKENS])

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """The base generates the answers and keeps them in `memory`; empty ones are left out.

        Raises:
            OrthogonalizeError: they are all empty.
        """
        if self.name not in memory.kept:
            memory.kept[self.name] = engine.answers(self.prompts, ANSWER_TOKENS)
        answered = [
            (prompt, answer, category)
            for prompt, answer, category in zip(self.prompts, memory.kept[self.name], self.categories, strict=True)
            if answer
        ]
        if not answered:
            raise OrthogonalizeError("every answer of the base model is empty; leave out --suite other")
        series = cross_entropy(engine, [p for p, _, _ in answered], [a for _, a, _ in answered])
        return {"loss.other_prompts": series.model_copy(update={"categories": [c for _, _, c in answered]})}


def other_loss(context: SuiteContext) -> OtherLoss:
    """The suite, for at most `context.limit` prompts spread over the categories."""
    found = evenly(other_prompts(), context.limit)
    return OtherLoss(context.chat.encode_all([prompt for prompt, _ in found]), [category for _, category in found])


ENTRIES = (
    SuiteEntry(
        "other",
        "cross-entropy of the base's own answers to 64 prompts of quite other kinds (code, translation, …), by kind",
        {"loss.other_prompts": "cross-entropy of the base's own answers, other prompts"},
        other_loss,
        origin="the package",
    ),
)
