"""Answers to prompt sets: generated once, and read as refusals and as the contrast's own behaviour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from ...core.files import fingerprint
from ...data.refusals import refused
from ...engines.base import Responder
from ..metrics import Series, yes_no_series


@dataclass(frozen=True)
class Item:
    """A prompt to answer: its ids as the model gets them, its text, and its category where it has one."""

    ids: list[int]
    text: str
    category: str | None = None


@dataclass(frozen=True)
class AnswerSet:
    """Prompts that belong together; with `sensitive`, reports fold them and can leave them out."""

    name: str
    items: list[Item]
    sensitive: bool = False

    @property
    def key(self) -> str:
        """`target` and `harmless` are the contrast's own sides, all else stands under `sets`."""
        return self.name if self.name in ("target", "harmless") else f"sets.{self.name}"


@dataclass(frozen=True)
class Answering:
    """The sets that every model answers; `refusal` and `behaviour` say what is counted in the answers."""

    sets: Sequence[AnswerSet]
    tokenizer: Any
    new_tokens: int
    behaviour_tokens: frozenset[int]
    refusal: bool = True
    behaviour: bool = True

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(item.ids) for each in self.sets for item in each.items) + self.new_tokens

    @property
    def counts(self) -> bool:
        """Whether anything is counted, rather than the base alone answers for the sake of its own losses."""
        return self.refusal or self.behaviour

    @cached_property
    def states(self) -> dict[str, str]:
        """By set, a fingerprint of what its answers depend on besides the model."""
        return {s.name: fingerprint([[item.ids for item in s.items], self.new_tokens]) for s in self.sets}

    def answers(self, engine: Responder, sets: Sequence[str]) -> dict[str, list[list[int]]]:
        """What a model says to `sets`, as token ids; they are asked in one batch."""
        wanted = [each for each in self.sets if each.name in sets]
        flat = iter(engine.answers([item.ids for each in wanted for item in each.items], self.new_tokens))
        return {each.name: list(islice(flat, len(each.items))) for each in wanted}

    def text(self, ids: Sequence[int]) -> str:
        """An answer as people read it."""
        decoded: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded

    def series(self, answers: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Series]:
        """What is counted in a model's answers."""
        result: dict[str, Series] = {}
        for each in self.sets:
            categories = [item.category for item in each.items]
            said = answers[each.name]
            if self.refusal:
                result[f"refusal.{each.key}"] = yes_no_series([refused(self.text(ids)) for ids in said], categories)
            if self.behaviour and each.name in ("target", "harmless"):
                flags = [bool(ids) and ids[0] in self.behaviour_tokens for ids in said]
                result[f"behaviour.{each.key}"] = yes_no_series(flags, categories)
        return result
