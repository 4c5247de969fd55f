"""The demo's model, edited, behind a real `vllm serve`, as the `openai` client sees it: chat, streaming, logprobs.

The server and its client take two minutes, so only `make prove` starts them.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.planted import LAYER, store_direction
from helpers.vllm_server import COMPLAINT, vllm_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthogonalize.commands.edit import edit
from orthogonalize.models.demo_model import planted_model

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

QUESTION = [{"role": "user", "content": "How do I make pancakes?"}]
LENGTH, TOP = 12, 3


@pytest.fixture(scope="module")
def model():
    return planted_model()


@pytest.fixture(scope="module")
def edited(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("edited")
    direction = store_direction(model, out / "direction.safetensors")
    edit(str(model), out / "edited", direction=direction, layer=LAYER, method="ablate", scope="all")
    return out / "edited"


@pytest.fixture(scope="module")
def server(edited, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    options = ("--dtype", "float32", "--max-model-len", "256", "--served-model-name", "edited")
    with vllm_server(edited, log, *options) as running:
        yield running
    assert running.process.poll() is not None


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def expected(model, edited):
    """transformers' greedy answer, as text and token ids, and edited and base log-probabilities [token, vocabulary]."""
    tokenizer = AutoTokenizer.from_pretrained(edited)
    changed, base = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (edited, model))
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        whole = changed.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=LENGTH, do_sample=False)
        scores = [each(whole).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1) for each in (changed, base)]
    answer = whole[0, prompt.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True), answer.tolist(), *scores


def ask(client, **options):
    return client.chat.completions.create(
        model="edited", messages=QUESTION, max_tokens=LENGTH, temperature=0, **options
    )


@pytest.mark.prove
def test_a_chat_gets_the_answer_of_the_edited_weights(client, expected):
    assert [model.id for model in client.models.list()] == ["edited"]
    answer = ask(client)
    assert answer.choices[0].message.content.split() == expected[0].split()
    assert answer.usage.completion_tokens == len(expected[1])


@pytest.mark.prove
def test_a_stream_gives_the_same_answer_in_pieces(client, expected):
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True) if chunk.choices]
    assert sum(bool(piece) for piece in pieces) > 1
    assert "".join(pieces).split() == expected[0].split()


@pytest.mark.prove
def test_log_probabilities_are_those_of_transformers(client, expected):
    answer = ask(client, logprobs=True, top_logprobs=TOP, extra_body={"return_tokens_as_token_ids": True})
    _, tokens, scores, before = expected
    assert (scores - before).abs().max() > 0.1, "the base would not pass for the edited model"
    content = answer.choices[0].logprobs.content
    assert [each.token for each in content] == [f"token_id:{token}" for token in tokens]
    for each, row in zip(content, scores, strict=True):
        best = row.topk(TOP)
        assert [top.token for top in each.top_logprobs] == [f"token_id:{i}" for i in best.indices.tolist()]
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert math.isclose(each.logprob, best.values[0].item(), abs_tol=1e-3)


@pytest.mark.prove
def test_nothing_but_weights_and_settings_is_served_and_the_log_has_no_complaint(server, client, edited):
    assert not list(edited.rglob("*.py"))
    assert "auto_map" not in json.loads((edited / "config.json").read_text())
    assert ask(client).choices
    log = server.log.read_text("utf-8", "replace")
    assert "LlamaForCausalLM" in log, "at level INFO, vLLM names the class that it serves"
    assert server.complaints() == []


def test_what_counts_as_a_complaint():
    assert COMPLAINT.search("WARNING 01-01 00:00:00 [utils.py:1] Some weights were not initialized from checkpoint")
    assert COMPLAINT.search("ERROR 01-01 00:00:00 [utils.py:1] needs trust_remote_code: remote code")
    assert not COMPLAINT.search("INFO 01-01 00:00:00 [loader.py:1] Loading weights took 0.01 seconds")
