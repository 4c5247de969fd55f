"""Tokenizing text that will be continued: what precedes it (BOS) is kept, what follows it (EOS) dropped."""

from __future__ import annotations

import pytest
from helpers.chat import choosing_tokenizer
from tokenizers import processors

from orthogonalize.data.chat import ChatFormat
from orthogonalize.data.tokenization import encode_open_ended
from orthogonalize.evals.suites.lm_eval import harness_model
from orthogonalize.evals.suites.multiple_choice import MultipleChoice, Question
from orthogonalize.evals.suites.text_losses import pile_losses

AROUND = {"nothing": ("", 0), "a BOS": ("<s> ", 0), "both": ("<s> ", 1), "an EOS": ("", 1), "two": ("<s> ", 2)}


def ending(around: str):
    tokenizer = choosing_tokenizer()
    before, after = AROUND[around]
    form = f"{before}$A" + " </s>" * after
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=special)
    return tokenizer


def test_unusual_vocabulary_loses_no_token():
    """One that lacks the letters that are tried to find out what the tokenizer appends."""

    class Digits:
        def __call__(self, texts, add_special_tokens=True, **_):
            rows = [[0] * add_special_tokens + [int(c) for c in t if c in "23"] for t in [*texts]]
            return {"input_ids": rows if isinstance(texts, list) else [i for row in rows for i in row]}

    assert encode_open_ended(Digits(), ["23", "3"]) == [[0, 2, 3], [0, 3]]


@pytest.mark.parametrize("around", AROUND)
def test_bos_is_kept_and_eos_dropped_everywhere(around, data):
    tokenizer = ending(around)
    bare = tokenizer("how do i bake", add_special_tokens=False)["input_ids"]
    start = [1] if AROUND[around][0] else []
    assert encode_open_ended(tokenizer, ["how do i bake", "how"]) == [[*start, *bare], [*start, bare[0]]]
    assert encode_open_ended(tokenizer, ["how do i bake"], 3) == [[*start, *bare][:3]]
    assert encode_open_ended(tokenizer, []) == []
    assert ChatFormat(tokenizer, templated=False).encode("how do i bake") == [*start, *bare]
    found = MultipleChoice.of("mmlu", [Question("how do i", (" bake", " fold a"), 0)], tokenizer)
    assert found.choices == [[tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("bake", "fold a")]]
    assert harness_model(None, tokenizer, 20).tok_encode("how do i bake") == [*start, *bare]
    assert not any(2 in ids for ids in pile_losses(tokenizer, data, 5).completions)
