"""Read and write files that others may have prepared, write atomically, and fingerprint what results depend on."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import OrthogonalizeError
from .locks import try_lock

CALL = 2**20  # bytes written per system call; more would evict the copied data from the faster caches
LARGEST_TEXT = 256 * 2**20  # bytes of a file that is read whole, unless a reader says otherwise
DEEPEST = 64  # nested lists and tables of JSON


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that may be anybody's.

    Raises:
        ValueError: it is not JSON, or nested more than `DEEPEST` deep, which would be too deep for its readers.
    """
    with suppress(RecursionError):
        found = json.loads(text)
        level = [found]
        for _ in range(DEEPEST):
            level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return found
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _inside(value: Any) -> Iterable[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (each for each in inner if isinstance(each, dict | list))


def fingerprint(inputs: Any) -> str:
    """SHA-256 of `inputs` as JSON; objects that JSON cannot hold count as their `str`."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def no_follow(path: str, flags: int) -> int:
    """An `opener` for `open` that refuses symbolic links and does not wait for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def partial_file(file: Path) -> Path:
    """Where `file` is kept before it is complete, under a name that the next run finds; open it with `no_follow`."""
    return file.with_name(f".{file.name}.partial")


@contextmanager
def new_partial_file(file: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside `file` under a random name, removed at the end if it is still there.

    Those that killed processes left behind are removed as well.

    Raises:
        OSError: it cannot be created.
    """
    for stale in file.parent.glob(f".{_escaped(file.name)}.*.partial"):
        _remove_unless_locked(stale)
    partial = file.with_name(f".{file.name}.{secrets.token_hex(8)}.partial")
    with open(partial, "xb", opener=no_follow) as out:
        with suppress(OSError):  # a file system without locks
            try_lock(out.fileno())
        try:
            yield partial, out
        finally:
            with suppress(OSError):
                partial.unlink()


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _remove_unless_locked(file: Path) -> None:
    with suppress(OSError), open(file, "r+b", opener=no_follow) as left:
        if try_lock(left.fileno()):
            file.unlink()


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write `content` so that `file` is either as it was or complete; an error leaves nothing behind.

    A symbolic link at `file` is replaced, not followed.

    Raises:
        OSError: the file cannot be written.
    """
    with new_partial_file(file) as (partial, out):
        out.write(content.encode() if isinstance(content, str) else content)
        out.flush()
        partial.replace(file)


def write_all(descriptor: int, offset: int, data: memoryview) -> None:
    """Write `data` at `offset`, in as many calls as it takes: one may write less than it is given.

    Raises:
        OSError: the file cannot be written.
    """
    while data:
        count = os.pwrite(descriptor, data[:CALL], offset)
        data, offset = data[count:], offset + count


def check_regular_files(folder: Path) -> None:
    """Reject a folder that holds a pipe, device or socket, which could keep a reader waiting forever.

    Raises:
        OrthogonalizeError: the message names it.
    """
    for path in folder.rglob("*"):
        check_regular(path)


def check_regular(path: Path) -> None:
    """Reject a pipe, device or socket.

    Raises:
        OrthogonalizeError: the message names it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OrthogonalizeError(f"{path} is not a regular file; remove it")


def check_text(file: Path, most: int = LARGEST_TEXT) -> None:
    """Reject what cannot be read whole: a pipe, device or socket, and a file of more than `most` bytes.

    Raises:
        OrthogonalizeError: the message names it.
    """
    check_regular(file)
    if file.is_file() and file.stat().st_size > most:
        raise OrthogonalizeError(f"{file} has {file.stat().st_size} bytes, and at most {most} are read")


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def is_inside(path: Path, *folders: Path) -> bool:
    """Whether `path`, all symbolic links followed, lies in one of `folders`."""
    return any(path.resolve().is_relative_to(folder) for folder in folders)


def write_after(file: Path, size: int, data: bytes) -> None:
    """Write `data` after the first `size` bytes of `file`, in place of whatever follows them.

    Raises:
        OSError: the file cannot be written.
    """
    with open(file, "r+b" if size else "wb", opener=no_follow) as out:
        out.truncate(size)
        out.seek(size)
        out.write(data)
