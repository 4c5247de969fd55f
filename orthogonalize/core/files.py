"""Write files atomically, and fingerprint what results depend on."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any


def fingerprint(inputs: Any) -> str:
    """SHA-256 of `inputs` as JSON; objects that JSON cannot hold count as their `str`."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def partial_file(file: Path) -> Path:
    """Where `file` is written before it is complete."""
    return file.with_name(f".{file.name}.partial")


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write `content` so that `file` is either as it was or complete; an error leaves nothing behind.

    Raises:
        OSError: the file cannot be written.
    """
    partial = partial_file(file)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(file)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_after(file: Path, size: int, data: bytes) -> None:
    """Write `data` after the first `size` bytes of `file`, in place of whatever follows them.

    Raises:
        OSError: the file cannot be written.
    """
    with file.open("r+b" if size else "wb") as out:
        out.truncate(size)
        out.seek(size)
        out.write(data)
