"""Answers to prompt sets: generated once, and read as refusals and as the contrast's own behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .engines import Respondent
from .journal import fingerprint_of
from .measures import Series, shares
from .refusals import PREFIXES, refused
from .suites import Memory


@dataclass(frozen=True)
class Item:
    """A prompt to answer: its ids as the model gets them, its text, and its category where it has one."""

    ids: list[int]
    text: str
    category: str | None = None


@dataclass(frozen=True)
class AnswerSet:
    """Prompts that belong together. `measures` are the prefixes under which its rates are stored."""

    name: str
    items: list[Item]
    sensitive: bool = False

    @property
    def key(self) -> str:
        """`target` and `harmless` are the contrast's own sides, all else stands under `sets`."""
        return self.name if self.name in ("target", "harmless") else f"sets.{self.name}"


@dataclass(frozen=True)
class Answering:
    """The suite that answers every set; `refusal` and `behaviour` say what is counted in the answers."""

    sets: Sequence[AnswerSet]
    tokenizer: Any
    new_tokens: int
    behaviour_tokens: frozenset[int]
    refusal: bool = True
    behaviour: bool = True
    name: str = "answers"

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(item.ids) for each in self.sets for item in each.items) + self.new_tokens

    @property
    def state(self) -> str:
        sets = [[each.name, [[item.ids, item.category] for item in each.items]] for each in self.sets]
        counted = [self.refusal, self.behaviour, sorted(self.behaviour_tokens), PREFIXES]
        return fingerprint_of(sets, self.new_tokens, counted)

    def measure(self, engine: Respondent, memory: Memory) -> dict[str, Series]:
        """Answer all sets in one batch; the ids are left in `memory`."""
        rows = [item.ids for each in self.sets for item in each.items]
        flat = engine.answers(rows, self.new_tokens)
        result: dict[str, Series] = {}
        for each in self.sets:
            answers, flat = flat[: len(each.items)], flat[len(each.items) :]
            memory.answers[each.name] = answers
            result |= self._series(each, answers)
        return result

    def text(self, ids: Sequence[int]) -> str:
        """An answer as people read it."""
        decoded: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded

    def _series(self, each: AnswerSet, answers: Sequence[Sequence[int]]) -> dict[str, Series]:
        categories = [item.category for item in each.items]
        result = {}
        if self.refusal:
            result[f"refusal.{each.key}"] = shares([refused(self.text(ids)) for ids in answers], categories)
        if self.behaviour and each.name in ("target", "harmless"):
            flags = [bool(ids) and ids[0] in self.behaviour_tokens for ids in answers]
            result[f"behaviour.{each.key}"] = shares(flags, categories)
        return result
