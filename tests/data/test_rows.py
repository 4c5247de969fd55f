"""Every format yields the same rows."""

from __future__ import annotations

import json

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from orthogonalize.data.rows import read_rows, read_split

ROWS = [{"prompt": "how do I\u2028bake", "n": 1}, {"prompt": "why", "n": 2}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def test_every_format_yields_the_same_rows(tmp_path):
    contents = {
        "a.json": json.dumps(ROWS).encode(),
        "a.jsonl": b"\xef\xbb\xbf" + LINES,
        "a.jsonl.zst": zstandard.compress(LINES),
        "a.csv": "prompt,n\nhow do I\u2028bake,1\nwhy,2\n".encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.PARQUET")
    for name in [*contents, "a.PARQUET"]:
        assert list(read_rows(tmp_path / name)) == ROWS, name
    with pytest.raises(ValueError, match=r"\.md is not a known format"):
        read_rows(tmp_path / "a.md")


def test_only_a_split_is_read_from_all_its_shards(tmp_path):
    for number, row in enumerate(ROWS):
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"test-{number:05}-of-00002.parquet")
    shard = tmp_path / "test-00001-of-00002.parquet"
    assert list(read_split(shard)) == ROWS
    assert list(read_rows(shard)) == ROWS[1:]


def test_a_name_that_counts_endless_shards_is_refused_at_once(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "test-00000-of-999999999.parquet")
    with pytest.raises(ValueError, match=r"test-000000000-of-999999999\.parquet is missing"):
        list(read_split(tmp_path / "test-00000-of-999999999.parquet"))
