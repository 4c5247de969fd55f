"""Read rows from data files: JSON, JSON Lines (also .zst), CSV and Parquet, whole or in shards."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.files import parse_json

# Formats of rows, by suffix: a new one is named here and read below.
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def check_utf8(file: Path) -> None:
    """Check that a text file is UTF-8.

    Raises:
        ValueError: it is not; says what it looks like and how to convert it.
        OSError: the file cannot be read.
    """
    content = file.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:  # UTF-8 of text holds no zero bytes
        encoding = "UTF-16BE" if content[:1] == b"\0" else "UTF-16LE"
        encoding = "UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else encoding
    else:
        try:
            content.decode("utf-8")
            return
        except UnicodeDecodeError:
            encoding = "LATIN1"
    raise ValueError(
        f"it is not UTF-8 but looks like {encoding}; convert it: "
        f"iconv -f {encoding} -t UTF-8 {file.name} > utf8{file.suffix}"
    )


def read_rows(file: Path) -> Iterator[Any]:
    """The rows of one file, in order; its suffix says the format. JSON Lines are read line by line, as needed.

    Raises:
        ValueError: the content does not have the suffix's format, or the suffix is unknown.
        OSError: the file cannot be read.
    """
    match file.suffix.lower():
        case ".jsonl" | ".zst":
            return _json_lines(file)
        case ".json":
            rows = parse_json(file.read_text("utf-8-sig"))
            if not isinstance(rows, list):
                raise ValueError("the top level is not a list")
            return iter(rows)
        case ".csv":
            from pyarrow import csv

            options = csv.ParseOptions(newlines_in_values=True)
            return iter(csv.read_csv(file, parse_options=options).to_pylist())
        case ".parquet":
            from pyarrow import parquet

            return iter(parquet.read_table(file).to_pylist())
        case suffix:
            raise ValueError(f"{suffix or 'no suffix'} is not a known format")


def read_split(file: Path) -> Iterator[Any]:
    """The rows of a dataset's split, of which `file` is the only file or, in Parquet, any one shard.

    Raises:
        ValueError, OSError: see `read_rows`; a shard is missing.
    """
    shards = _shards(file) if file.suffix == ".parquet" else [file]
    return (row for shard in shards for row in read_rows(shard))


def _json_lines(file: Path) -> Iterator[Any]:
    if file.suffix.lower() == ".zst":
        import zstandard

        with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            yield from (parse_json(line) for line in io.TextIOWrapper(stream, "utf-8") if line.strip())
    else:
        with file.open(encoding="utf-8-sig") as text:
            yield from (parse_json(line) for line in text if line.strip())


def _shards(file: Path) -> list[Path]:
    """All shards of the split that `file` belongs to; where their names count them, none may be missing."""
    split = file.name.partition("-")[0]
    counted = re.fullmatch(rf"{re.escape(split)}-\d+-of-(\d{{1,9}})\.parquet", file.name)
    if counted is None:
        return sorted(file.parent.glob(f"{split}-*.parquet")) or [file]
    digits = len(counted[1])
    shards = []
    for number in range(int(counted[1])):  # a name may count any number
        shards.append(file.with_name(f"{split}-{number:0{digits}}-of-{counted[1]}.parquet"))
        if not shards[-1].is_file():
            raise ValueError(f"{shards[-1].name} is missing")
    return shards
