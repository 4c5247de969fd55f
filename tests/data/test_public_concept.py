"""The concept `refusal`: public sets of their own for train, val and test, without texts that two of them share."""

from __future__ import annotations

import json
import random

import pytest
from helpers.benchmark_files import refusal_sets, write
from helpers.command_line import command

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data.contrast import read_contrast
from orthogonalize.data.prompts import Prompt, PublicConcept, check_contrast, concept, plain, split_prompts
from orthogonalize.selection.run_folder import load_run


@pytest.fixture
def data(tmp_path):
    return refusal_sets(tmp_path / "data")


def texts(prompts, split):
    return [p.text for p in prompts if p.split == split]


def stored(file, column, *, only=None):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row[column] for row in rows if only is None or row["Source"] == only]


def test_each_split_has_sets_of_its_own(data):
    positive, negative, sensitive = read_contrast("refusal", None, None, data=data)
    assert sensitive == ["positive"]
    assert texts(positive, "val") == stored(data / "walledai/HarmBench/standard/train.jsonl", "prompt")
    file = data / "JailbreakBench/JBB-Behaviors/behaviors/harmful.jsonl"
    assert texts(positive, "test") == stored(file, "Goal", only="Original"), "rows taken from the train sets are not"
    train = texts(positive, "train")
    assert len(train) == 40 + 10 + 10
    assert train[:40] == stored(data / "walledai/AdvBench/train.jsonl", "prompt")
    assert {p.category for p in positive if p.split == "val"} == {"chores"}
    assert all(text.startswith("sure") for text in texts(negative, "test"))
    shared = texts(negative, "train"), texts(negative, "val")
    assert all(text.startswith("the") for part in shared for text in part)
    assert not {plain(t) for t in shared[0]} & {plain(t) for t in shared[1]}, "train and val share one set out"
    assert min(map(len, shared)) >= 12
    assert {p.side for p in positive} == {"positive"}
    assert {p.side for p in negative} == {"negative"}


def test_text_of_a_later_split_is_left_out_of_train(data, monkeypatch):
    notes: list[str] = []
    monkeypatch.setattr("orthogonalize.data.contrast.note", notes.append)
    taken = stored(data / "JailbreakBench/JBB-Behaviors/behaviors/harmful.jsonl", "Goal", only="Original")[:2]
    kept = stored(data / "walledai/AdvBench/train.jsonl", "prompt")
    write(data / "walledai" / "AdvBench", [{"prompt": t} for t in [taken[0], f" {taken[1].upper()}. ", *kept]])
    positive, _, _ = read_contrast("refusal", None, None, data=data)
    assert texts(positive, "train")[:40] == kept
    assert set(taken) <= set(texts(positive, "test"))
    assert notes[0] == "refusal, positive side: 2 train prompts are left out, which other sets have as well"


def test_split_prompts_keeps_given_splits():
    pool = [Prompt(f"{split} {i}", "positive", split) for split in ("train", "val", "test") for i in range(30)]
    drawn = split_prompts(pool, 3, train=20, val=40, test=10, spare=6)
    assert drawn == split_prompts(pool, 3, train=20, val=40, test=10, spare=6)
    assert drawn != split_prompts(pool, 4, train=20, val=40, test=10, spare=6)
    sizes = {split: len(texts(drawn, split)) for split in ("train", "val", "test", "spare")}
    assert sizes == {"train": 20, "val": 30, "test": 10, "spare": 6}
    for prompt in drawn:
        assert prompt.text.split()[0] == {"spare": "train"}.get(prompt.split, prompt.split)
    assert len({p.text for p in drawn}) == len(drawn)


def test_contrast_with_a_text_in_two_splits_is_refused():
    one, two = ([Prompt(f"{name} {i}", "positive") for i in range(8)] for name in "ab")
    check_contrast(one, two)
    for text in ("a 1", "A  1?"):
        with pytest.raises(OrthogonalizeError, match=r"1 prompts appear in two splits .*train and test"):
            check_contrast([*one, Prompt(text, "positive", "test")], two)
    few = [Prompt(f"c {i}", "positive", "train" if i < 5 else "test") for i in range(20)]
    with pytest.raises(OrthogonalizeError, match="the positive side has 5 train prompts; at least 6"):
        check_contrast(few, two)


def test_extract_reads_local_copies_of_the_concept(model, data, tmp_path):
    words = ("extract", model, "--concept", "refusal", "--no-filter", "--behaviour-tokens", "sorry", "--trials", "0")
    words = (*words, "--finders", "dim", "--train", "12", "--val", "6", "--test", "8")
    status, said = command(*words, "--data", data, "--out", tmp_path / "run")
    assert status == 0, said
    run = load_run(tmp_path / "run")
    assert run.info.sensitive == ["positive"]
    for side, starts in (
        ("positive", {"train": ("how", "why", "today"), "val": ("please",), "test": ("colour",)}),
        ("negative", {"train": ("the",), "val": ("the",), "test": ("sure",)}),
    ):
        for split, size in (("train", 12), ("val", 6), ("test", 8)):
            found = run.texts(side, split)
            assert len(found) == size
            assert all(text.startswith(starts[split]) for text in found), (side, split)
    (data / "walledai" / "HarmBench" / "standard" / "train.jsonl").unlink()
    status, said = command(*words, "--data", data, "--out", tmp_path / "other")
    assert status == 1
    assert said.startswith("error: no local copy of walledai/HarmBench standard train: ")
    assert "\n" not in said


@pytest.mark.parametrize(("words", "message"), [
    (("--concept", "lists"), "error: --data holds local copies of public sets; name some"),
    (
        ("--positive", "planted:lists.jsonl", "--negative", "planted:sentences.jsonl"),
        "error: --data holds local copies of public sets; name some",
    ),
    (("--concept", "refusal", "--data", "nowhere"), "error: no such folder: nowhere"),
    (("--concept", "refusal", "--column", "text"), "error: --column belongs to --positive and --negative"),
])  # fmt: skip
def test_data_that_cannot_be_used_is_one_line(words, message, tmp_path):
    status, said = command("extract", tmp_path, "--out", tmp_path / "run", "--data", tmp_path, *words)
    assert status == 1
    assert said.startswith(message)


def test_hub_ids_and_columns_are_those_of_the_public_sets(monkeypatch):
    """What is asked of the Hub, by repository, configuration and split."""
    asked = []

    def rows(source):
        asked.append(str(source))
        start, more = " ".join(map(str, asked)), random.Random(len(asked)).random()
        return iter([dict.fromkeys(source.columns, f"{start} {more} {i}") | {"Source": "Original"} for i in range(20)])

    monkeypatch.setattr("orthogonalize.data.benchmarks._hub_rows", rows)
    named = concept("refusal")
    assert isinstance(named, PublicConcept)
    positive, _, _ = read_contrast("refusal", None, None)
    assert len(positive) == 5 * 20
    assert asked == [
        "JailbreakBench/JBB-Behaviors behaviors harmful", "walledai/HarmBench standard train",
        "walledai/AdvBench train", "walledai/MaliciousInstruct train", "walledai/TDC23-RedTeaming train",
        "mlabonne/harmless_alpaca test", "mlabonne/harmless_alpaca train",
    ]  # fmt: skip
