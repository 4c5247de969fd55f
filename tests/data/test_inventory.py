"""What is said of prompts that were read, dropped and split."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from helpers.command_line import UNTRIED

from orthogonalize.commands.extract import extract
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data.contrast import read_contrast
from orthogonalize.data.inventory import drop_too_long, inventory
from orthogonalize.data.prompts import LoadedPrompts, Prompt, load_prompts, split_prompts

WANTED = {"train": 40, "val": 8, "test": 20}


def table(text: str) -> list[dict[str, str]]:
    """The rows by column; cells are two spaces apart."""
    head, *rows = [[cell for cell in line.split("  ") if cell] for line in text.splitlines()]
    return [dict(zip([h.strip() for h in head], [c.strip() for c in row], strict=True)) for row in rows[:2]]


def test_rows_dropped_and_split_are_counted(tmp_path):
    """150 lines with 30 unique prompts used to become 17, 4 and 9 of 40, 8 and 20 without a word."""
    texts = [f"prompt number {i % 30}" for i in range(150)]
    (tmp_path / "few.txt").write_text("\n".join([*texts, "", " "]) + "\n")
    few, many = load_prompts(str(tmp_path / "few.txt")), [Prompt(f"other {i}", "negative") for i in range(100)]
    assert (few.rows, few.empty, few.duplicates, len(few)) == (152, 2, 120, 30)
    fitting = {"positive": few[:28], "negative": many}
    drawn = [p for side in fitting.values() for p in split_prompts(side, 0, **WANTED)]
    text = inventory({"positive": few, "negative": many}, fitting, drawn, drawn[1:], WANTED)
    first, second = table(text)
    assert first == {
        "prompts": "positive", "read": "152", "empty": "2", "duplicate": "120", "too long": "2",
        "train": "17 of 40", "val": "3 of 8", "test": "8 of 20", "filtered": "1", "unused": "0",
    }  # fmt: skip
    assert second == {
        "prompts": "negative", "read": "100", "empty": "0", "duplicate": "0", "too long": "0",
        "train": "40", "val": "8", "test": "20", "filtered": "0", "unused": "32",
    }  # fmt: skip
    assert text.splitlines()[-1].startswith("fewer prompts than asked for: train, val and test shrink in proportion")
    whole = {"positive": many, "negative": many}
    enough = [Prompt(p.text, side, p.split) for side in whole for p in split_prompts(many, 0, **WANTED)]
    assert len(inventory(whole, whole, enough, enough, WANTED).splitlines()) == 3


def test_extract_prints_the_table_and_drops_what_does_not_fit(model, sources, tmp_path, monkeypatch):
    """The tiny model has a context of 512 tokens."""
    said: list[str] = []
    monkeypatch.setattr("orthogonalize.commands.extract.note", lambda *lines: said.append("\n".join(lines)))
    lists = {side: Path(file).read_text().split("\n") for side, file in sources.items()}
    long = "how do i bake a cake " * 400
    found = extract(
        str(model), tmp_path / "run", positive=[*lists["positive"], lists["positive"][0], long],
        negative=lists["negative"], settings=UNTRIED, finders=("dim",), train=8, val=2, test=3,
    )  # fmt: skip
    first, second = table(next(text for text in said if text.startswith("prompts")))
    assert (first["duplicate"], first["too long"], first["train"], first["test"]) == ("1", "1", "8", "3")
    assert (second["duplicate"], second["too long"]) == ("0", "0")
    assert int(first["read"]) == len(lists["positive"]) + 2
    assert all(len(p.text) < 500 for p in found.prompts)


@pytest.mark.parametrize("count", [24, 400])
def test_more_train_prompts_than_there_are_leave_some_to_choose_and_report_by(count):
    drawn = split_prompts([Prompt(f"prompt {i}", "positive") for i in range(count)], 0, train=100_000, val=32, test=100)
    counts = Counter(p.split for p in drawn)
    assert counts.total() == count
    assert counts["val"] == min(32, count // 10)
    assert counts["test"] == min(100, count // 10)


def test_extract_takes_all_prompts_where_more_are_asked_for(model, sources, tmp_path):
    found = extract(str(model), tmp_path / "run", **sources, settings=UNTRIED, finders=("dim",), train=100_000)
    assert Counter(p.split for p in found.prompts if p.side == "positive") == {"train": 20, "val": 2, "test": 2}


def test_only_texts_that_could_be_too_long_are_encoded():
    encoded = []

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return [0] * len(text.split())

    short, middle, long = (Prompt("word " * n, "positive") for n in (10, 150, 450))
    assert drop_too_long({"positive": [short] * 9 + [middle, long]}, encode, 400) == {
        "positive": [short] * 9 + [middle]
    }
    assert encoded == ["a", middle.text, long.text]
    assert drop_too_long({"positive": [long]}, encode, None) == {"positive": [long]}
    with pytest.raises(OrthogonalizeError, match=r"9 of 12 positive prompts are longer than 300 tokens"):
        drop_too_long({"positive": [short] * 3 + [long] * 9}, encode, 400)


def test_wrong_column_says_what_was_read_and_which_columns_there_are(tmp_path):
    rows = [{"language": "en", "ask": f"prompt {i}"} for i in range(150)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(OrthogonalizeError) as error:
        read_contrast(None, str(tmp_path / "a.jsonl"), str(tmp_path / "a.jsonl"), column="ask")
    assert "both sides" in str(error.value)
    with pytest.raises(OrthogonalizeError) as error:
        read_contrast(None, str(tmp_path / "a.jsonl"), [f"other {i}" for i in range(9)], column="language")
    assert str(error.value) == (
        "the positive side has 1 prompt of 150 rows (149 duplicates, 0 empty; is --column right? "
        "Columns of text: language, ask); at least 8 are required"
    )


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("encoding", "named"),
    [("latin-1", "LATIN1"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")],
)
def test_other_encodings_say_how_to_convert(tmp_path, suffix, encoding, named):
    content = {".txt": "Ça va ?\n", ".csv": "prompt\nÇa va ?\n"}.get(suffix, '["Ça va ?"]')
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content.encode(encoding))
    with pytest.raises(OrthogonalizeError) as error:
        load_prompts(str(file))
    assert f"looks like {named}; convert it: iconv -f {named} -t UTF-8 a{suffix} > utf8{suffix}" in str(error.value)
    file.write_bytes(b"\xef\xbb\xbf" + content.encode())
    if suffix != ".jsonl":  # a list per line is no prompt
        assert [p.text for p in load_prompts(str(file))] == ["Ça va ?"]


def test_prompts_can_be_a_list_or_a_path(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert load_prompts(tmp_path / "a.txt") == load_prompts([" one", "two", "two"])
    assert load_prompts(["one", "one", ""]).rows == 3
    with pytest.raises(OrthogonalizeError, match="the list of prompts holds no prompts"):
        load_prompts([])
    assert LoadedPrompts([Prompt("a", "positive")], 3, 1).duplicates == 1
