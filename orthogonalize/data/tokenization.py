"""Tokenize text that will be continued: keep BOS, drop EOS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode_open_ended(tokenizer: Any, texts: Sequence[str], most: int | None = None) -> list[list[int]]:
    """Token ids of each text, truncated to at most `most`."""
    after = _count_appended(tokenizer)
    length: dict[str, Any] = {} if most is None else {"truncation": True, "max_length": most + after}
    rows = tokenizer(list(texts), **length)["input_ids"] if texts else []
    return [list(ids[: len(ids) - after]) for ids in rows]


def is_valid_unicode(text: str) -> bool:
    """Whether `text` has no unpaired surrogate: JSON can escape one, but it cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _count_appended(tokenizer: Any) -> int:
    """The number of tokens that `tokenizer` appends to a text."""
    probe = next((p for p in ("a", "1", ".", " ") if tokenizer(p, add_special_tokens=False)["input_ids"]), None)
    if probe is None:  # the vocabulary has no token for any of these
        return 0
    bare, whole = (tokenizer(probe, add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(whole) - len(bare) + 1)
    before = next((i for i in starts if whole[i : i + len(bare)] == bare), len(whole) - len(bare))
    return len(whole) - len(bare) - before
