"""Judges behind a server: what is asked and read, what goes wrong on the way, and that nothing holds the key."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.command_line import UNTRIED
from helpers.openai_server import CUT, GARBAGE, OpenAIServer

from orthogonalize.cli import main
from orthogonalize.commands.judge import judge
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.engines import endpoint
from orthogonalize.engines.endpoint import CONCURRENT, Endpoint, EndpointClient
from orthogonalize.evals.judges.base import Judgement
from orthogonalize.evals.judges.endpoint import read_labels
from orthogonalize.evals.judges.registry import find_judge
from orthogonalize.evals.judges.remote import PORTION
from orthogonalize.selection.behaviour import MeasureInfo

RUN_SETTINGS = UNTRIED
SECRET = "sk-do-not-tell"
SAID = {"bake": "refuses", "roast": "complies", "fry": "asks back", "boil": "lectures"}


def labels(messages: list[dict]) -> list[str]:
    """Labels an answer by the word in it."""
    text = messages[-1]["content"].split("<answer>")[1].split("</answer>")[0]
    return ["Answer: ", next((said for word, said in SAID.items() if word in text), "?"), "\nHarmful: no"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pauses, and no keys of whoever runs the tests."""
    monkeypatch.setattr(endpoint, "WAITS", (0.0, 0.0, 0.0))
    for name in (endpoint.KEY, endpoint.OPENAI_KEY):
        monkeypatch.delenv(name, raising=False)


def answers(folder: Path, texts: list[str]) -> Path:
    file = folder / "answers.json"
    file.write_text(json.dumps([{"prompt": f"how {i}", "response": text} for i, text in enumerate(texts)]))
    return file


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("Answer: complies\nHarmful: yes", Judgement(True, False, False)),
        ("Answer: refuses\nHarmful: no", Judgement(False, True, False)),
        ("**Answer:** asks back\nHarmful: no", Judgement(False, False, True)),
        ("I think so.\nanswer: Lectures.\nharmful: NO", Judgement(False, False, True)),
        ("Harmful: no", Judgement(False, None, None)),
        ("Answer: perhaps\nHarmful: perhaps", Judgement()),
        ("", Judgement()),
    ],
)
def test_replies_are_read_as_they_come(reply, read):
    assert read_labels(reply) == read


def test_evasions_are_neither_refusals_nor_compliance(tmp_path):
    texts = ["bake", "roast", "fry", "boil", "", "  \n", "something else"]
    with OpenAIServer(labels) as server:
        found = judge(answers(tmp_path, texts), f"endpoint:{server.url}")
    asked = [request["messages"][0]["content"] for request in server.requests]
    assert len(asked) == 1 + 5, "the first is a trial, and an empty answer needs no judge"
    assert (found.refusal.value, found.refusal.n, found.refusal.unparseable) == (1 / 6, 6, 1)
    assert (found.evasion.value, found.evasion.n, found.evasion.unparseable) == (4 / 6, 6, 1)
    assert (found.harmful.value, found.harmful.n) == (0.0, 7)
    assert found.model == "only"
    assert {request["temperature"] for request in server.requests} == {0}


@pytest.mark.parametrize("fault", [429, 500, CUT, GARBAGE])
def test_passing_failures_are_asked_again(fault, tmp_path):
    with OpenAIServer(labels, faults=[None, fault, fault]) as server:
        found = judge(answers(tmp_path, ["bake", "roast"]), f"endpoint:{server.url}")
    assert (found.refusal.value, found.refusal.n) == (0.5, 2)
    assert len(server.requests) == 1 + 2 + 2


def test_a_pause_that_a_server_asks_for_ends_when_nobody_waits():
    with OpenAIServer(labels, faults=[429], retry_after=3600) as server:
        client = EndpointClient(Endpoint.parse(f"{server.url}#only"))
        failed: list[str] = []

        def ask() -> None:
            with pytest.raises(OrthogonalizeError) as error:
                client.answer([{"role": "user", "content": "how"}], 1)
            failed.append(str(error.value))

        with client:
            asking = threading.Thread(target=ask)
            asking.start()
            while not server.requests:
                time.sleep(0.01)
        asking.join(timeout=30)
    assert len(failed) == 1, "it is still waiting"


@pytest.mark.parametrize(
    ("fault", "said"),
    [(429, "status 429, 4 times"), (CUT, "no answer"), (GARBAGE, "no chat completion"), (402, "status 402")],
)
def test_lasting_failures_are_one_line_and_keep_what_was_judged(fault, said, tmp_path, monkeypatch):
    monkeypatch.setenv(endpoint.KEY, SECRET)
    file = answers(tmp_path, ["bake"] * PORTION + ["roast"] * 2)
    with OpenAIServer(labels, key=SECRET, faults=[None] * (1 + PORTION) + [fault] * 20) as server:
        words = ["judge", str(file), "--judge", f"endpoint:{server.url}#only", "--json"]
        failed = CliRunner().invoke(main, words)
        assert failed.exit_code == 1
        assert said in failed.stderr
        assert "finished measurements were kept" in failed.stderr
        server.faults.clear()
        done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    sent = [request["messages"][-1]["content"] for request in server.requests]
    assert sum("bake" in content for content in sent) == 2 + PORTION, "sent again, beside a trial each"
    assert json.loads(done.stdout)["refusal"]["n"] == PORTION + 2
    assert SECRET not in failed.output + done.output
    assert set(server.keys) == {f"Bearer {SECRET}"}


def test_an_answer_that_the_server_rejects_is_unreadable(tmp_path):
    with OpenAIServer(labels, faults=[None, 400, 413]) as server:
        found = judge(answers(tmp_path, ["bake", "bake", "bake"]), f"endpoint:{server.url}")
    assert (found.refusal.value, found.refusal.n, found.refusal.unparseable) == (1.0, 1, 2)


def test_settings_that_a_model_does_not_take_are_left_out(tmp_path):
    with OpenAIServer(labels, refused=("max_tokens", "temperature")) as server:
        found = judge(answers(tmp_path, ["bake"]), f"endpoint:{server.url}")
    assert found.refusal.value == 1.0
    assert server.requests[-1].keys() == {"model", "messages", "max_completion_tokens", "stream"}


def test_no_file_holds_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv(endpoint.KEY, SECRET)
    file = answers(tmp_path, ["bake"] * PORTION + ["roast"])
    with (
        OpenAIServer(labels, key=SECRET, faults=[None] * (1 + PORTION) + [402]) as server,
        pytest.raises(OrthogonalizeError),
    ):
        judge(file, f"endpoint:{server.url}")
    stored = [path.read_bytes() for path in tmp_path.iterdir() if path.is_file()]
    assert len(stored) == 2, "the answers, and the journal of what was judged"
    assert not any(SECRET.encode() in content for content in stored)


def test_a_wrong_key_is_not_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv(endpoint.KEY, SECRET)
    with OpenAIServer(labels, key="another") as server:
        failed = CliRunner().invoke(
            main, ["judge", str(answers(tmp_path, ["bake"])), "--judge", f"endpoint:{server.url}"]
        )
    assert failed.exit_code == 1
    assert f"the key is not accepted (status 401); set {endpoint.KEY}" in failed.stderr
    assert SECRET not in failed.output


def test_openais_key_goes_to_openai_alone(monkeypatch):
    monkeypatch.setenv(endpoint.OPENAI_KEY, SECRET)
    assert Endpoint.parse("https://api.openai.com/v1#some").key == SECRET
    for elsewhere in ("http://127.0.0.1:1/v1", "https://api.openai.com.example.org/v1#some"):
        assert Endpoint.parse(elsewhere).key is None
    monkeypatch.setenv(endpoint.KEY, "mine")
    assert Endpoint.parse("https://api.openai.com/v1#some").key == "mine"
    assert "mine" not in repr(Endpoint.parse("https://api.openai.com/v1#some"))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/v1/", "http://h:8000/v1"),
        ("https://h/some/v2#a/b", "https://h/some/v2"),
        ("http://h/v1/chat/completions#m", "http://h/v1"),
    ],
)
def test_addresses_are_taken_as_they_are_copied(text, url):
    assert Endpoint.parse(text).url == url


def test_requests_run_beside_each_other_and_replies_keep_their_order(tmp_path):
    together = threading.Barrier(CONCURRENT, timeout=20)

    def wait(messages):
        if "how" in messages[-1]["content"].split("<answer>")[0]:  # not the trial
            together.wait()
        return labels(messages)

    texts = ["bake", "roast"] * (CONCURRENT // 2)
    with OpenAIServer(wait) as server:
        found = judge(answers(tmp_path, texts), f"endpoint:{server.url}")
    assert server.most == CONCURRENT
    assert found.refusal.value == 0.5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("endpoint", "judge endpoint is behind a server: write endpoint:URL#MODEL"),
        ("endpoint=some", "judge endpoint is behind a server"),
        ("endpoint:nowhere", "is not of the form http"),
        ("wildguard:http://h", "judge wildguard is behind no server"),
    ],
)
def test_judges_are_named_as_they_run(name, said):
    with pytest.raises(OrthogonalizeError, match=said):
        find_judge(name)


def test_what_is_published_of_a_measure_has_no_address():
    info = MeasureInfo(name="judge:endpoint:http://10.0.0.7:8000/v1#/home/me/model")
    assert (info.public_name, info.describe()) == ("judge:endpoint", "answers that endpoint says show it")
    assert MeasureInfo(name="judge:wildguard=/home/me/w").public_name == "judge:wildguard"
    assert MeasureInfo(name="python:/home/me/mine.py:shows").public_name == "python:mine.py:shows"


def test_eval_reports_a_servers_judgements(model, edited, run, tmp_path):
    with OpenAIServer(lambda messages: ["Answer: asks back\nHarmful: no"], models=("/home/me/judge",)) as server:
        words = ["eval", edited, "--base", model, "--run", run, "--out", tmp_path / "report", "--engine", "hf"]
        words += ["--suite", "refusal", "--max-new-tokens", 4, "--limit", 3, "--judge", f"endpoint:{server.url}"]
        done = CliRunner().invoke(main, ["--quiet", *map(str, words)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "report" / "report.json").read_text()
    report = json.loads(text)
    assert report["judges"] == {"endpoint": "judge"}
    assert server.url not in text
    assert "/home/me" not in text
    rates = report["edited"]["judges"]["endpoint"]
    assert (rates["evasion"]["target"]["value"], rates["refusal"]["target"]["value"]) == (1.0, 0.0)
    assert report["answers"][0]["judges"]["endpoint"]["edited_evasion"] is True
