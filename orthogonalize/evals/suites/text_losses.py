"""Suites `pile` and `alpaca`: cross-entropy of general text, and of the answers in instruction data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import OrthogonalizeError
from ...core.files import fingerprint
from ...data.benchmarks import ALPACA, PILE, rows
from ...data.chat import ChatFormat
from ...data.tokenization import encode_open_ended, encode_rendered
from ..metrics import Series
from .base import BaseOutputs, SuiteEntry

if TYPE_CHECKING:
    from ...engines.base import Ids, Responder

TEXT_TOKENS = 256  # per text, as in eliroc98/refusal_direction
TEXT_COUNT = 100  # texts, without --limit


def cross_entropy(engine: Responder, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Series:
    """The summed cross-entropy of each completion after its prompt, in nats."""
    scores = engine.scores(prompts, completions)
    return Series(kind="loss", values=[-s.logprob for s in scores], tokens=[len(c) for c in completions])


@dataclass(frozen=True)
class TextLosses:
    """Cross-entropy of fixed texts, given as prompts and completions in ids; only completions are scored.

    `key` is that of the series.
    """

    name: str
    key: str
    prompts: list[list[int]]
    completions: list[list[int]]

    @property
    def longest(self) -> int:
        return max(len(p) + len(c) for p, c in zip(self.prompts, self.completions, strict=True))

    @cached_property
    def state(self) -> str:
        return fingerprint([self.prompts, self.completions])

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """Score the texts; `memory` is not used."""
        return {self.key: cross_entropy(engine, self.prompts, self.completions)}


def pile_losses(tokenizer: Any, data: Path | None, limit: int) -> TextLosses:
    """The first `TEXT_TOKENS` tokens of general texts; the first token of each is context and is not scored."""
    encoded = encode_open_ended(tokenizer, [row["text"] for row in rows(PILE, data, limit)], TEXT_TOKENS)
    encoded = [ids for ids in encoded if len(ids) > 1]
    if not encoded:
        raise OrthogonalizeError(f"{PILE} has no text of at least two tokens")
    return TextLosses("pile", "loss.pile", [ids[:1] for ids in encoded], [ids[1:] for ids in encoded])


def alpaca_losses(tokenizer: Any, chat: ChatFormat, data: Path | None, limit: int) -> TextLosses:
    """Instruction data in the model's own chat template; prompt and answer are cut to `TEXT_TOKENS` tokens in all."""
    prompts, completions = [], []
    for row in rows(ALPACA, data, limit):
        text = "\n\n".join(part for part in (row["instruction"].strip(), (row["input"] or "").strip()) if part)
        prompt = chat.encode(text)
        [answer] = encode_rendered(tokenizer, [row["output"].strip()])
        answer = answer[: max(0, TEXT_TOKENS - len(prompt))]
        if answer:
            prompts.append(prompt)
            completions.append(answer)
    if not prompts:
        raise OrthogonalizeError(f"{ALPACA} has no example with an answer within {TEXT_TOKENS} tokens")
    return TextLosses("alpaca", "loss.alpaca", prompts, completions)


ENTRIES = (
    SuiteEntry(
        "pile",
        "cross-entropy of general text, 256 tokens per text, 100 texts unless --limit says otherwise",
        {"loss.pile": "cross-entropy, Pile"},
        lambda context: pile_losses(context.tokenizer, context.data, context.limit or TEXT_COUNT),
        PILE,
    ),
    SuiteEntry(
        "alpaca",
        "cross-entropy of the answers in instruction data, texts as for pile",
        {"loss.alpaca": "cross-entropy, Alpaca answers"},
        lambda context: alpaca_losses(context.tokenizer, context.chat, context.data, context.limit or TEXT_COUNT),
        ALPACA,
    ),
)
