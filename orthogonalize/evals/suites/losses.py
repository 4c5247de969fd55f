"""Cross-entropy of texts: the base's own answers, general text, and instruction data (its answers only)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...core.errors import OrthogonalizeError
from ...core.files import fingerprint
from ...data.benchmarks import ALPACA, PILE, rows
from ...data.chat import ChatFormat
from ...data.tokenization import encode_open_ended
from ...engines.base import Ids, Responder
from ..metrics import Series
from .base import BaseOutputs

TEXT_TOKENS = 256  # a text, as in eliroc98/refusal_direction


def series(engine: Responder, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Series:
    """Summed cross-entropy of each completion after its prompt."""
    scores = engine.scores(prompts, completions)
    return Series(kind="loss", values=[-s.logprob for s in scores], tokens=[len(c) for c in completions])


@dataclass(frozen=True)
class OwnLosses:
    """Loss on the base model's own harmless answers: how much likelier or less likely they have become."""

    longest: int
    state: str  # that of the answers
    name: str = "loss"

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """The answers come from `memory`."""
        return {"loss.own_completions": series(engine, memory.own_prompts, memory.own)}


@dataclass(frozen=True)
class TextLosses:
    """Loss on fixed texts, as (prompt, completion) ids; only completions are scored."""

    name: str
    prompts: list[list[int]]
    completions: list[list[int]]

    @property
    def longest(self) -> int:
        return max(len(p) + len(c) for p, c in zip(self.prompts, self.completions, strict=True))

    @cached_property
    def state(self) -> str:
        return fingerprint([self.prompts, self.completions])

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """`memory` is not needed: the texts are nobody's own."""
        return {f"loss.{self.name}": series(engine, self.prompts, self.completions)}


def pile_losses(tokenizer: Any, data: Path | None, limit: int) -> TextLosses:
    """The first `TEXT_TOKENS` tokens of general texts; the first token is only context."""
    encoded = encode_open_ended(tokenizer, [row["text"] for row in rows(PILE, data, limit)], TEXT_TOKENS)
    encoded = [ids for ids in encoded if len(ids) > 1]
    if not encoded:
        raise OrthogonalizeError(f"{PILE} has no text of two tokens or more")
    return TextLosses("pile", [ids[:1] for ids in encoded], [ids[1:] for ids in encoded])


def alpaca_losses(tokenizer: Any, chat: ChatFormat, data: Path | None, limit: int) -> TextLosses:
    """Instruction data through the model's own chat template; prompt and answer up to `TEXT_TOKENS` tokens."""
    prompts, completions = [], []
    for row in rows(ALPACA, data, limit):
        text = "\n\n".join(part for part in (row["instruction"].strip(), (row["input"] or "").strip()) if part)
        prompt = chat.encode(text)
        answer = list(tokenizer(row["output"].strip(), add_special_tokens=False)["input_ids"])
        answer = answer[: max(0, TEXT_TOKENS - len(prompt))]
        if answer:
            prompts.append(prompt)
            completions.append(answer)
    if not prompts:
        raise OrthogonalizeError(f"{ALPACA} has no example with an answer within {TEXT_TOKENS} tokens")
    return TextLosses("alpaca", prompts, completions)
