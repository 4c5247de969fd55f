"""Counts and error messages that say what they announce."""

from __future__ import annotations

import json

import pytest

from orthogonalize.core.errors import LONGEST, OrthogonalizeError, first_line, shown
from orthogonalize.core.words import counted
from orthogonalize.models.loading import load_tokenizer


def test_one_is_singular():
    assert [counted(n, "tensor") for n in (0, 1, 2)] == ["0 tensors", "1 tensor", "2 tensors"]


def test_a_line_that_ends_with_a_colon_gets_what_it_announces():
    assert first_line(ValueError("could not load from one of:\n  (1) a file,\n\n (2) a folder")) == (
        "could not load from one of: (1) a file, (2) a folder"
    )
    assert first_line(ValueError("first\nsecond")) == "first"
    assert first_line(ValueError()) == "ValueError"


def test_missing_tokenizer_is_one_whole_sentence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(OrthogonalizeError, match="has no usable tokenizer: ") as error:
        load_tokenizer(tmp_path)
    assert not str(error.value).rstrip().endswith(":")


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_whose_vocabulary_was_not_copied_is_missing(name, tmp_path):
    """transformers builds it all the same, of special tokens alone."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(OrthogonalizeError, match="no file holds its vocabulary; fetch its tokenizer files again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "401 Client Error for url: https://me:secret@hub.example/api/models/a/b",
        "bad //secret@host",
        "ftp://a:secret@b:1/",
    ],
)
def test_a_password_in_an_address_is_not_shown(text):
    for said in (shown(text), str(OrthogonalizeError(text)), first_line(ValueError(text))):
        assert "secret" not in said
        assert "//***@" in said
    assert shown("mail a@b.c, or see https://hub.example/@a") == "mail a@b.c, or see https://hub.example/@a"


@pytest.mark.parametrize("letter", ["x", "\x1b", "\U000e0001", "word "])
@pytest.mark.parametrize("count", [1, LONGEST - 40, LONGEST, 10**6])
def test_a_message_of_any_length_keeps_its_ends(letter, count):
    said = str(OrthogonalizeError(f"the model is called {letter * count}; choose another"))
    assert said.startswith("the model is called ")
    assert said.endswith("; choose another")
    assert said.isprintable()
    assert len(said) <= LONGEST < 500
    assert str(OrthogonalizeError(said)) == said
