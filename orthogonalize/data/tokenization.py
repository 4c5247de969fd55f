"""Texts that go on, as token ids: with what a tokenizer puts before a text (BOS), without what it puts after (EOS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode_open_ended(tokenizer: Any, texts: Sequence[str], most: int | None = None) -> list[list[int]]:
    """Ids of every text, at most `most` of each."""
    after = _after(tokenizer)
    length: dict[str, Any] = {} if most is None else {"truncation": True, "max_length": most + after}
    rows = tokenizer(list(texts), **length)["input_ids"] if texts else []
    return [list(ids[: len(ids) - after]) for ids in rows]


def is_valid_unicode(text: str) -> bool:
    """Whether `text` can be written down: JSON can hold half a character, and no file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _after(tokenizer: Any) -> int:
    """How many tokens `tokenizer` puts after a text."""
    probe = next((p for p in ("a", "1", ".", " ") if tokenizer(p, add_special_tokens=False)["input_ids"]), None)
    if probe is None:  # a vocabulary in which none of these is anything
        return 0
    bare, whole = (tokenizer(probe, add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(whole) - len(bare) + 1)
    before = next((i for i in starts if whole[i : i + len(bare)] == bare), len(whole) - len(bare))
    return len(whole) - len(bare) - before
