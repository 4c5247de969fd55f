"""Thoughts that a model writes before its answer: how they are marked, recognised and closed.

Where a prompt ends in an open thought, or a model begins with one, the first token says nothing about the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Thinking = Literal["off", "skip", "keep"]
THINKING: tuple[Thinking, ...] = get_args(Thinking)
SWITCHES = ("enable_thinking", "thinking")  # arguments by which chat templates turn thoughts off


@dataclass(frozen=True)
class ThoughtMark:
    """How a family of models marks a thought.

    Attributes:
        opener, closer: the texts that begin and end it.
        empty: what stands for no thought at all at the beginning of an answer.
        close: what ends a thought that the prompt has opened.
    """

    opener: str
    closer: str
    empty: str
    close: str


def _tagged(opener: str, closer: str) -> ThoughtMark:
    """Marks with an empty thought as Qwen3's template writes it."""
    return ThoughtMark(opener, closer, f"{opener}\n\n{closer}\n\n", f"\n{closer}\n\n")


MARKS = (
    _tagged("<think>", "</think>"),
    _tagged("<thinking>", "</thinking>"),
    _tagged("<reasoning>", "</reasoning>"),
    _tagged("[THINK]", "[/THINK]"),  # Magistral
    _tagged("<seed:think>", "</seed:think>"),
    _tagged("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    _tagged("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ThoughtMark(  # gpt-oss: an answer is a channel of its own
        "<|channel|>analysis", "<|channel|>final",
        "<|channel|>final<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
)  # fmt: skip


def open_thought(text: str) -> ThoughtMark | None:
    """The mark of a thought that `text` opens and does not close."""
    return next((mark for mark in MARKS if text.rfind(mark.opener) > text.rfind(mark.closer)), None)


def has_thought(text: str) -> bool:
    """Whether `text` has a thought, open or closed, or begins an answer after one."""
    return any(mark.opener in text or mark.closer in text for mark in MARKS)


def switches_of(template: str) -> dict[str, bool]:
    """The arguments that turn thoughts off in a chat template that takes one."""
    return {name: False for name in SWITCHES if re.search(rf"(?<![\w.'\"]){name}(?!\w)", template)}


def mark_of(tokenizer: Any) -> ThoughtMark | None:
    """The mark whose opener (its first part) and closer are tokens of a vocabulary."""
    known = tokenizer.get_vocab()
    return next(
        (mark for mark in MARKS if _first_part(mark.opener) in known and _first_part(mark.closer) in known), None
    )


def _first_part(marker: str) -> str:
    """The part of a marker that is one token where any is: all of it, or its first special token."""
    return "<|channel|>" if marker.startswith("<|channel|>") else marker


def opener_tokens(tokenizer: Any) -> list[int]:
    """The tokens of a vocabulary that begin a thought."""
    known = tokenizer.get_vocab()
    return sorted({known[part] for part in (_first_part(mark.opener) for mark in MARKS) if part in known})


def special_tokens(tokenizer: Any) -> list[int]:
    """The tokens that structure a text: special ones, and those of thoughts, which are plain in some vocabularies."""
    known = tokenizer.get_vocab()
    added = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    marks = {_first_part(marker) for mark in MARKS for marker in (mark.opener, mark.closer)}
    return sorted({*tokenizer.all_special_ids, *added, *(known[part] for part in marks if part in known)})


def answer_texts(tokenizer: Any, answers: Iterable[Sequence[int]]) -> list[str]:
    """The texts of answers, given as ids, without their thoughts."""
    return [without_thought(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in answers]


def without_thought(answer: str) -> str:
    """What an answer says after its thought; all of it if it has none, and nothing if the thought never ends."""
    for mark in MARKS:
        if mark.opener in answer or mark.closer in answer:
            _, closed, rest = answer.rpartition(mark.closer)
            return rest.strip() if closed else ""
    return answer
