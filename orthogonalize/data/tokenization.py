"""Tokenize text that will be continued: keep BOS, drop EOS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.errors import OrthogonalizeError, first_line


def encode_open_ended(tokenizer: Any, texts: Sequence[str], most: int | None = None) -> list[list[int]]:
    """Token ids of each text, truncated to at most `most`."""
    after = _count_appended(tokenizer)
    length: dict[str, Any] = {} if most is None else {"truncation": True, "max_length": most + after}
    rows = _ids(tokenizer, list(texts), **length) if texts else []
    return [list(ids[: len(ids) - after]) for ids in rows]


def encode_rendered(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as it is, without special tokens that the tokenizer would add."""
    return [list(_ids(tokenizer, text, add_special_tokens=False)) for text in texts]


def _ids(tokenizer: Any, texts: str | list[str], **options: Any) -> Any:
    """What the tokenizer makes of a text or several.

    Raises:
        OrthogonalizeError: it fails; its files may be anybody's.
    """
    try:
        return tokenizer(texts, **options)["input_ids"]
    except BaseException as error:  # a panic of the Rust library is no `Exception`
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise OrthogonalizeError(f"the model's tokenizer fails on a prompt: {first_line(error)}") from error


def is_valid_unicode(text: str) -> bool:
    """Whether `text` has no unpaired surrogate: JSON can escape one, but it cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _count_appended(tokenizer: Any) -> int:
    """The number of tokens that `tokenizer` appends to a text."""
    probe = next((p for p in ("a", "1", ".", " ") if _ids(tokenizer, p, add_special_tokens=False)), None)
    if probe is None:  # the vocabulary has no token for any of these
        return 0
    bare, whole = (_ids(tokenizer, probe, add_special_tokens=special) for special in (False, True))
    starts = range(len(whole) - len(bare) + 1)
    before = next((i for i in starts if whole[i : i + len(bare)] == bare), len(whole) - len(bare))
    return len(whole) - len(bare) - before
