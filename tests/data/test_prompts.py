"""Prompt sources, splits and chat rendering."""

from __future__ import annotations

import csv
import json

import pyarrow
import pytest
from helpers.chat import TEMPLATE, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data.chat import ChatFormat
from orthogonalize.data.contrast import read_contrast
from orthogonalize.data.prompts import Prompt, check_contrast, concept, load_prompts, split_prompts

TEXTS = ["How are you?", "What is 2 + 2?\nShow your work.", "Ça va ?"]


def test_every_file_format_gives_the_same_prompts(tmp_path):
    rows = [{"instruction": t, "category": "c", "other": 1} for t in TEXTS]
    (tmp_path / "a.json").write_text(json.dumps(TEXTS))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "category"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    for name in ("a.json", "b.json", "c.jsonl", "d.csv", "e.parquet"):
        assert [p.text for p in load_prompts(str(tmp_path / name))] == TEXTS, name
    single = [t for t in TEXTS if "\n" not in t]
    (tmp_path / "f.txt").write_text("\n\n".join(single) + "\n" + single[0])
    assert [p.text for p in load_prompts(str(tmp_path / "f.txt"))] == single
    assert load_prompts(str(tmp_path / "c.jsonl"))[0].category == "c"


def test_quoted_newlines_in_csv_stay_inside_their_prompt(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,n\n"first\nline",1\nsecond,2\n')
    assert [p.text for p in load_prompts(str(tmp_path / "a.csv"))] == ["first\nline", "second"]


def test_named_column_is_used_and_an_unknown_one_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"mine": "hello", "instruction": "other"}')
    assert load_prompts(str(tmp_path / "a.jsonl"), column="mine")[0].text == "hello"
    with pytest.raises(OrthogonalizeError, match="mine, instruction"):
        load_prompts(str(tmp_path / "a.jsonl"), column="theirs")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"a": 1}', "not a list"),
        ("a.json", "[1]", "must be a string or an object"),
        ("a.jsonl", '{"instruction": 3}', "holds int"),
        ("a.txt", "\n \n", "no prompts"),
        ("a.parquet", "PAR", "cannot be read"),
        ("a.md", "x", "not one of"),
    ],
)
def test_bad_prompt_file_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(OrthogonalizeError, match=message):
        load_prompts(str(tmp_path / name))


def test_missing_sources_are_named():
    with pytest.raises(OrthogonalizeError, match=r"no such prompt file: nowhere\.txt"):
        load_prompts("nowhere.txt")
    with pytest.raises(OrthogonalizeError, match="neither a file, a Hub dataset"):
        load_prompts("nowhere")
    with pytest.raises(OrthogonalizeError, match="unknown concept 'x'"):
        concept("x")


@given(st.integers(8, 400), st.integers(0, 5))
def test_split_is_disjoint_seeded_and_as_large_as_possible(count, seed):
    prompts = [Prompt(f"p{i}", "positive") for i in range(count)]
    parts = split_prompts(prompts, seed)
    assert parts == split_prompts(prompts, seed)
    assert len({p.text for p in parts}) == len(parts) == min(count, 260)
    sizes = [sum(p.split == s for p in parts) for s in ("train", "val", "test")]
    if count >= 260:
        assert sizes == [128, 32, 100]
    assert all(sizes)


def test_contrast_needs_two_different_sets_of_at_least_eight():
    one, two = ([Prompt(f"{s}{i}", "positive") for i in range(8)] for s in "ab")
    check_contrast(one, two)
    with pytest.raises(OrthogonalizeError, match="both sides"):
        check_contrast(one, one)
    with pytest.raises(OrthogonalizeError, match="at least 8"):
        check_contrast(one, two[:7])


def test_planted_sets_do_not_overlap():
    sets = [load_prompts(f"planted:{a}_{b}.jsonl") for a in ("planting", "contrast") for b in ("cooking", "other")]
    texts = [p.text.lower() for s in sets for p in s]
    assert len(texts) == len(set(texts))
    assert all(len(s) >= 260 for s in sets)


def test_template_that_writes_a_bos_gets_exactly_one():
    tokenizer = tiny_tokenizer()
    ids = ChatFormat(tokenizer).encode("how do i bake a cake")
    assert ids.count(tokenizer.bos_token_id) == 1
    text = tokenizer.apply_chat_template([{"role": "user", "content": "how"}], tokenize=False)
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2, "the trap this guards against"


def test_positions_are_the_tokens_after_the_instruction():
    tokenizer = tiny_tokenizer()
    chat = ChatFormat(tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat.post_instruction_tokens()) == ["[end]", "[answer]", ":"]
    assert chat.positions() == [-3, -2, -1]


def test_system_prompt_and_arguments_reach_the_template():
    tokenizer = tiny_tokenizer(TEMPLATE + "{% if polite %} please{% endif %}")
    plain = ChatFormat(tokenizer).encode("how")
    polite = ChatFormat(tokenizer, system="now", arguments={"polite": True}).encode("how")
    words = tokenizer.convert_ids_to_tokens(polite)
    assert words[1:4] == ["[system]", "now", "[end]"]
    assert words[-1] == "please"
    assert len(polite) == len(plain) + 4


def test_model_without_chat_template_needs_the_option():
    tokenizer = tiny_tokenizer(None)
    with pytest.raises(OrthogonalizeError, match="--no-chat-template"):
        ChatFormat(tokenizer)
    chat = ChatFormat(tokenizer, templated=False)
    assert chat.encode("how do") == tokenizer("how do")["input_ids"]
    assert chat.positions() == [-1]


def test_hub_dataset_is_read_by_id_column_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"goal": ["a", "b", "a"], "prompt": ["x", "y", "z"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [p.text for p in load_prompts("owner/name", "negative", "goal", "test")] == ["a", "b"]
    assert [p.text for p in load_prompts("owner/name")] == ["x", "y", "z"]
    assert asked == [("owner/name", "test"), ("owner/name", "train")]


def test_unreadable_hub_dataset_is_one_clear_error(monkeypatch):
    import datasets

    def load_dataset(name, split):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist.\nTry again.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(OrthogonalizeError, match=r"'owner/name' .* doesn't exist"):
        load_prompts("owner/name")


def test_template_with_a_date_gets_a_fixed_date():
    dated = TEMPLATE.replace("[answer]", "{{ strftime_now('%d %b %Y') }}[answer]")
    tokenizer, fixed = tiny_tokenizer(dated), tiny_tokenizer(TEMPLATE.replace("[answer]", "26 Jul 2024[answer]"))
    assert dated != TEMPLATE
    assert ChatFormat(tokenizer).encode("how") == ChatFormat(fixed).encode("how")


def test_column_beside_a_named_concept_is_refused():
    with pytest.raises(OrthogonalizeError, match="--column belongs to"):
        read_contrast("cooking", None, None, column="text")
