"""The model's own answers to a run's train prompts, and the tokens of both that conditional edits are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..core.interrupts import check
from ..core.journal import Journal
from ..core.progress import track
from ..data.chat import ChatFormat
from ..data.prompts import PreservedPrompt, Prompt, texts_of
from ..edits.fitting.fit import ANSWER_START, PRESERVED, AnsweredTokens, FitTokens
from ..edits.fitting.regression import EXAMPLES, FURTHER, HARMLESS, TARGET

ANSWER_TOKENS = 48

Generate = Callable[[list[list[int]], int, Any], list[list[int]]]
"""Greedy answers to prompts (token ids), of at most so many tokens; takes a progress callback."""


class OwnAnswers:
    """Generates the model's answers, set by set; a set that the journal has is not generated again."""

    def __init__(self, chat: ChatFormat, generate: Generate, journal: Journal) -> None:
        self.chat, self.generate, self.journal = chat, generate, journal

    def fit_tokens(self, prompts: Sequence[Prompt], preserved: Sequence[PreservedPrompt]) -> FitTokens:
        """The tokens of the train prompts, of the spare negative ones, and of the answers to them (see `FitTokens`).

        With target prompts, the positive ones are the examples of what the target is to become.
        """
        sets: dict[str, list[str]] = {}
        for p in preserved:
            if p.split == "train":
                sets.setdefault(p.source, []).append(p.text)
        positive, negative, target = (texts_of(prompts, side, "train") for side in ("positive", "negative", "target"))
        further = texts_of(prompts, "negative", "spare")
        return FitTokens(
            len(self.chat.positions()),
            self._answered(TARGET, target or positive, ANSWER_START),
            self._answered(HARMLESS, negative, ANSWER_TOKENS),
            {source: self._answered(f"{PRESERVED}{source}", each, ANSWER_TOKENS) for source, each in sets.items()},
            self._answered(EXAMPLES, positive, ANSWER_START) if target else None,
            self._answered(FURTHER, further, ANSWER_START) if further else None,
        )

    def _answered(self, name: str, texts: list[str], tokens: int) -> AnsweredTokens:
        """Prompts and answers of at most so many tokens."""
        ids = self.chat.encode_all(texts)
        if name not in self.journal:
            with track(f"the model's own answers ({name})", len(ids), "prompts") as advance:
                self.journal.put({name: self.generate(ids, tokens, advance)})
            check()
        rows = [row + answer for row, answer in zip(ids, self.journal[name], strict=True)]
        return AnsweredTokens(rows, [len(row) for row in ids])
