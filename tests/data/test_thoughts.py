"""Thoughts before an answer: closed where a template or the user says so, and never part of a behaviour."""

from __future__ import annotations

import pytest
from helpers.chat import TEMPLATE, tiny_tokenizer

from orthogonalize.data.chat import ChatFormat
from orthogonalize.data.thoughts import open_thought, opener_tokens, special_tokens, switches_of, without_thought

OPENS = TEMPLATE.replace("[answer] :", "[answer] : <think>")
SWITCHED = TEMPLATE.replace(
    "[answer] :", "[answer] :{% if enable_thinking is defined and not enable_thinking %} <think> </think>{% endif %}"
)


def thinker(template: str):
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def end_of(template: str, thinking: str, **arguments) -> list[str]:
    """The tokens after the instruction."""
    tokenizer = thinker(template)
    chat = ChatFormat(tokenizer, arguments=arguments, thinking=thinking)
    words = tokenizer.convert_ids_to_tokens(chat.encode("how"))
    assert chat.post_instruction_tokens() == chat.encode("how")[-len(chat.positions()) :]
    return words[words.index("[answer]") + 2 :]


@pytest.mark.parametrize(
    ("template", "thinking", "arguments", "expected"),
    [
        (OPENS, "keep", {}, ["<think>"]),
        (OPENS, "off", {}, ["<think>", "</think>"]),
        (OPENS, "skip", {}, ["<think>", "</think>"]),
        (SWITCHED, "keep", {}, []),
        (SWITCHED, "off", {}, ["<think>", "</think>"]),
        (SWITCHED, "off", {"enable_thinking": True}, []),
        (SWITCHED, "skip", {}, ["<think>", "</think>"]),
        (SWITCHED, "skip", {"enable_thinking": False}, ["<think>", "</think>"]),
        (TEMPLATE, "off", {}, []),
        (TEMPLATE, "skip", {}, ["<think>", "</think>"]),
    ],
)
def test_what_follows_the_instruction(template, thinking, arguments, expected):
    assert end_of(template, thinking, **arguments) == expected


def test_what_was_done_is_said_and_nothing_where_nothing_was():
    assert ChatFormat(thinker(OPENS), thinking="off").thought_closed() is not None
    assert "enable_thinking=false" in str(ChatFormat(thinker(SWITCHED), thinking="off").thought_closed())
    for chat in (ChatFormat(thinker(TEMPLATE), thinking="off"), ChatFormat(tiny_tokenizer(), thinking="skip")):
        assert chat.thought_closed() is None


def test_a_switch_is_a_name_of_its_own_in_the_template():
    assert switches_of("{% if enable_thinking %}") == {"enable_thinking": False}
    assert switches_of("{{ message.thinking }} {% if 'thinking' in message %}") == {}
    assert switches_of("{% if not thinking is defined %}") == {"thinking": False}


def test_open_thoughts_are_told_from_closed_ones():
    assert open_thought("a <think> b </think> c") is None
    assert open_thought("a <think> b </think> <think>\n") is not None
    assert open_thought("<|start|>assistant<|channel|>analysis<|message|>").closer == "<|channel|>final"


@pytest.mark.parametrize(
    ("answer", "rest"),
    [("plain", "plain"), ("<think>x</think> y", "y"), ("x</think>\n\ny", "y"), ("<think> it never ends", "")],
)
def test_an_answer_is_what_follows_its_thought(answer, rest):
    assert without_thought(answer) == rest


def test_openers_are_structural_even_where_they_are_plain_tokens():
    tokenizer = thinker(TEMPLATE)
    opener = tokenizer.convert_tokens_to_ids("<think>")
    assert opener_tokens(tokenizer) == [opener]
    assert {opener, tokenizer.eos_token_id, tokenizer.bos_token_id} <= set(special_tokens(tokenizer))
    assert tokenizer.convert_tokens_to_ids("sorry") not in special_tokens(tokenizer)
