"""Chat templates from anybody: rendered as transformers does, within limits, and every failure is one line."""

from __future__ import annotations

import os
import time

import pytest
from helpers.chat import TEMPLATE, tiny_tokenizer

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data import template_process
from orthogonalize.data.chat import ChatFormat

USER = "{{ messages[0]['content'] }}"
HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "multiplies a string": "{{ 'x' * 10 ** 10 }}",
    "joins": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "writes much": "{% for i in range(90000) %}" + "x" * 100 + "{% endfor %}",
    "formats": "{{ '%10000000000d' % 1 }}",
    "nests formats": "{{ '{:>9999999999}'.format('x') }}",
    "divides by zero": "{{ 1 // 0 }}",
    "recurses": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "is nested deeply": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "returns nothing": "",
    "returns blanks": "{{ ' ' }}",
    "raises": "{{ raise_exception('line one\\nline two \\x1b[31m' ~ 'x' * 5000) }}",
    "is no template": "{% if %}",
    "reads what is not there": "{{ messages[7]['content'].x.y }}",
    "is a type error": "{{ 1 + 'x' }}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "is a key error": "{{ {}['x']['y'] }}",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 4.0)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_ends_in_one_line(name):
    began = time.monotonic()
    with pytest.raises(OrthogonalizeError) as error:
        ChatFormat(tiny_tokenizer(HOSTILE[name] or "{# nothing #}")).encode_all(["how", "why"])
    said = str(error.value)
    assert said.startswith("the chat template rejects this prompt: ")
    assert said.isprintable(), said
    assert len(said) < 400
    assert time.monotonic() - began < 60
    assert ChatFormat(tiny_tokenizer()).encode("how"), "the next template is rendered"


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{{ bos_token }}{{ messages | tojson }}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{{ m.content }}{% endfor %}{{ eos_token }} {{ flag }} {{ undefined }}",
        "{% for m in messages %}\n  {% generation %}{{ m['content'] | trim }}{% endgeneration %}\n{% endfor %} :",
    ],
)
def test_ids_are_those_of_transformers(template):
    tokenizer = tiny_tokenizer(template)
    for text in ("how do i bake", "ü 日本 \n\t <b>", "\U0001f600" * 3):
        chat = [{"role": "system", "content": "now"}, {"role": "user", "content": text}]
        expected = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False, flag="please"
        )
        assert ChatFormat(tokenizer, "now", {"flag": "please"}).encode(text) == expected


def test_one_process_serves_all(monkeypatch):
    chat = ChatFormat(tiny_tokenizer())
    first = chat.encode("how")
    worker = template_process._worker
    assert worker is not None
    assert chat.encode_all(["how"] * 300) == [first] * 300
    assert template_process._worker is worker
    with pytest.raises(OrthogonalizeError):
        ChatFormat(tiny_tokenizer(HOSTILE["divides by zero"])).encode("how")
    worker.process.kill()
    worker.process.wait()
    assert chat.encode("how") == first


PARTS = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %} [answer]"
NO_SYSTEM = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %} [answer]"


def test_template_that_drops_text_is_refused():
    """Both say nothing by themselves: the first loops over a text's characters, the second over other roles."""
    with pytest.raises(OrthogonalizeError, match="leaves the instruction out"):
        ChatFormat(tiny_tokenizer(PARTS)).check_template()
    with pytest.raises(OrthogonalizeError, match="leaves the system prompt out"):
        ChatFormat(tiny_tokenizer(NO_SYSTEM), "now").check_template()
    ChatFormat(tiny_tokenizer(NO_SYSTEM)).check_template()
    ChatFormat(tiny_tokenizer(TEMPLATE), "now").check_template()


def test_process_has_no_secrets(monkeypatch):
    template_process._end()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ChatFormat(tiny_tokenizer()).encode("how")
    worker = template_process._worker
    assert worker is not None
    with open(f"/proc/{worker.process.pid}/environ", "rb") as file:
        assert b"hf_secret" not in file.read()
    assert os.environ["HF_TOKEN"] == "hf_secret"
