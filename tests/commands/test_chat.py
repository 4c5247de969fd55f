"""`chat`: both sides answer with their own weights and remember what they said; what is typed, shown and saved."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.chat import choosing_tokenizer, store_choosing
from helpers.command_line import UNTRIED
from helpers.openai_server import CUT, HALF, OpenAIServer
from rich.console import Console

from orthogonalize import EditConfig, Trial, edit
from orthogonalize.cli import main
from orthogonalize.commands.chatting.screen import Screen, visible
from orthogonalize.commands.chatting.session import Session
from orthogonalize.commands.chatting.speakers import Local, hooked
from orthogonalize.data.chat import ChatFormat
from orthogonalize.engines import endpoint
from orthogonalize.engines.base import EngineOptions
from orthogonalize.engines.transformers import TransformersEngine
from orthogonalize.models.loading import load_model, load_tokenizer
from orthogonalize.selection.run_folder import load_run, save_selection

RUN_SETTINGS = UNTRIED
FIRST, SECOND = "how do i bake a cake please", "paint the wall now"
LENGTH = 6


def store_model(folder):
    """Every token is a word, so that answers say something."""
    return store_choosing(folder, vocab_size=len(choosing_tokenizer()))


def talk(*words, typed: list[str]) -> str:
    done = CliRunner().invoke(main, ["--quiet", "chat", *map(str, words)], input="\n".join(typed) + "\n")
    assert done.exit_code == 0, done.output
    return done.output


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def alone(folder: Path, turns: list[dict]) -> str:
    """The greedy answer of a checkpoint by itself, by transformers' own loop."""
    model, tokenizer = load_model(folder, "cpu"), load_tokenizer(folder)
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False)
    return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def expected(folder: Path, prompts: list[str]) -> list[str]:
    turns: list[dict] = []
    for prompt in prompts:
        turns.append({"role": "user", "content": prompt})
        turns.append({"role": "assistant", "content": alone(folder, turns)})
    return [turn["content"] for turn in turns[1::2]]


@pytest.fixture(scope="module")
def answers(model, edited):
    """Two turns of each side by itself, which are not the same."""
    found = {"base": expected(model, [FIRST, SECOND]), "edited": expected(edited, [FIRST, SECOND])}
    assert found["base"][0] != found["edited"][0]
    assert found["base"][1] != found["edited"][1]
    return found


@pytest.fixture(scope="module")
def tried(run, tmp_path_factory):
    """The run, with two edits to pick from."""
    folder = Path(shutil.copytree(run, tmp_path_factory.mktemp("tried") / "run"))
    found = load_run(folder)
    trials = [
        Trial(
            choice=EditConfig(method="ablate", scope="all", position=-1, layer=2, strength=strength),
            left=left, before=1.0, score=0.0, kl=kl, first_kl=kl, ce_increase=0.0, preserved={}, flipped={},
            kls={"": [kl]},
        )
        for strength, left, kl in ((1.0, 0.0, 0.2), (1.7, 0.2, 0.1))
    ]  # fmt: skip
    save_selection(found.candidates, trials, found.probes, folder)
    return folder


SHORT = ("--max-new-tokens", LENGTH, "--device", "cpu")


def test_swapped_weights_answer_as_each_model_does_by_itself(model, edited, answers, tmp_path):
    file = tmp_path / "said.jsonl"
    said = talk(edited, "--base", model, *SHORT, typed=[FIRST, SECOND, f"/save {file}", "/quit", "not asked"])
    assert [{side: row[side] for side in answers} for row in rows(file)] == [
        {side: answers[side][turn] for side in answers} for turn in (0, 1)
    ]
    assert [(row["conversation"], row["turn"], row["prompt"]) for row in rows(file)] == [(1, 1, FIRST), (1, 2, SECOND)]
    assert said.index("[base]") < said.index("[edited]")
    assert answers["edited"][0] in said


def test_base_is_the_recipes_and_an_engine_that_cannot_swap_gets_two_models(edited, answers, tmp_path, monkeypatch):
    monkeypatch.setattr(TransformersEngine, "load", lambda *_: None)  # silently ignores what it is given
    file = tmp_path / "said.jsonl"
    talk(edited, "--save", file, *SHORT, typed=[FIRST])
    assert rows(file)[0]["base"] == answers["base"][0]
    assert rows(file)[0]["edited"] == answers["edited"][0]


def test_hooks_answer_as_the_weights_that_they_stand_for(model, tried, tmp_path):
    edit(model, tmp_path / "edited", run=tried, pick=2)
    file = tmp_path / "said.jsonl"
    talk("--run", tried, "--pick", 2, "--save", file, *SHORT, typed=[FIRST, SECOND])
    for side, folder in (("base", model), ("edited", tmp_path / "edited")):
        assert [row[side] for row in rows(file)] == expected(folder, [FIRST, SECOND])
    assert any(row["base"] != row["edited"] for row in rows(file))


def test_next_takes_the_runs_prompts_each_in_a_new_conversation(model, edited, run, tmp_path):
    file = tmp_path / "said.jsonl"
    found = load_run(run)
    talk(edited, "--run", run, "--save", file, *SHORT, typed=["/n", "/next", SECOND, "/new", SECOND])
    sides = [found.texts(side, "test")[0] for side in ("positive", "negative")]
    assert [(row["conversation"], row["turn"], row["prompt"]) for row in rows(file)] == [
        (1, 1, sides[0]), (2, 1, sides[1]), (2, 2, SECOND), (3, 1, SECOND),
    ]  # fmt: skip


def test_own_prompts_come_to_an_end(edited, tmp_path):
    (tmp_path / "mine.txt").write_text(f"{FIRST}\n")
    said = talk(edited, "--prompts", tmp_path / "mine.txt", *SHORT, typed=["/n", "/n", "/nonsense", ""])
    assert said.count(f"> {FIRST}") == 1
    assert "no further prompt" in said
    assert said.count("/save [FILE]; /quit") == 2


def test_saving_never_replaces_the_files_of_others(edited, tmp_path):
    other, own = tmp_path / "other.jsonl", tmp_path / "own.jsonl"
    other.write_text("mine")
    said = talk(edited, *SHORT, typed=[f"/save {own}", FIRST, f"/save {other}", f"/save {own}", SECOND, f"/save {own}"])
    assert "nothing was said yet" in said
    assert "other.jsonl already exists" in said
    assert other.read_text() == "mine"
    assert len(rows(own)) == 2


def test_a_conversation_that_does_not_fit_is_told_and_can_begin_anew(edited, tmp_path):
    file = tmp_path / "said.jsonl"
    typed = [FIRST] * 3 + ["/new", FIRST]  # the tiny model takes 512 tokens
    said = talk(edited, "--save", file, "--max-new-tokens", 480, "--device", "cpu", typed=typed)
    assert "does not fit into 512" in said
    assert [(row["conversation"], row["turn"]) for row in rows(file)] == [(1, 1), (2, 1)]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "whom to talk to?"),
        (("--endpoint", "http://127.0.0.1:9/v1", "--pick", "1"), "--pick makes an edit of --run with hooks"),
        (("--endpoint", "nowhere"), "endpoint 'nowhere' is not of the form"),
        (("--endpoint", "http://me:secret@host/v1"), "has a password in it"),
        (("--endpoint", "http://h#a", "--endpoint", "http://h#b", "--endpoint", "http://h#c"), "once, or twice"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_one_line(words, complaint):
    done = CliRunner().invoke(main, ["--quiet", "chat", *words])
    assert done.exit_code == 1
    assert complaint in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert "secret" not in done.output


# Behind servers


def echo(messages: list[dict]) -> list[str]:
    """Says what it was told last, and after how many messages."""
    return [messages[-1]["content"], " after ", str(len(messages))]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "WAITS", (0.0, 0.0))
    for name in (endpoint.KEY, endpoint.OPENAI_KEY):
        monkeypatch.delenv(name, raising=False)


def test_two_served_models_are_asked_with_their_own_histories(tmp_path):
    file = tmp_path / "said.jsonl"
    with (
        OpenAIServer(echo, models=("mine", "other")) as edited,
        OpenAIServer(lambda messages: ["no: ", *echo(messages)]) as base,
    ):
        ends = ("--endpoint", f"{edited.url}#mine", "--endpoint", base.url)
        said = talk(*ends, "--system", "be short", "--save", file, typed=["one", "two"])
    assert [(row["base"], row["edited"]) for row in rows(file)] == [
        ("no: one after 2", "one after 2"),
        ("no: two after 4", "two after 4"),
    ]
    assert [turn["content"] for turn in base.requests[1]["messages"]] == ["be short", "one", "no: one after 2", "two"]
    assert {request["model"] for request in edited.requests} == {"mine"}
    assert {request["model"] for request in base.requests} == {"only"}
    assert "no: two after 4" in said


def test_an_answer_that_breaks_off_is_asked_again(tmp_path):
    with OpenAIServer(echo, faults=[HALF, CUT, None, 400, None]) as server:
        file = tmp_path / "said.jsonl"
        said = talk("--endpoint", server.url, "--save", file, typed=["one", "two", "three"])
    assert [row["edited"] for row in rows(file)] == ["one after 1", "three after 3"], "a failed turn leaves no trace"
    assert "status 400" in said


def test_a_server_of_several_models_wants_one_named(monkeypatch):
    monkeypatch.setenv(endpoint.KEY, "top-secret")
    with OpenAIServer(echo, models=("a", "b"), key="top-secret") as server:
        done = CliRunner().invoke(main, ["chat", "--endpoint", server.url])
    assert done.exit_code == 1
    assert "name one of the models that it serves, as in URL#MODEL (a, b)" in done.output


# The screen


def test_answers_stand_side_by_side_in_a_terminal_and_their_control_codes_do_nothing():
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=60, height=12, color_system=None)
    screen = Screen(["base", "edited"], console)
    with screen.answers() as update:
        update(0, "left " * 40)
        update(1, "right\n\x1b[2J\x07 here")
    last = written.getvalue().rpartition("base")[2]
    assert any("left" in line and "right" in line for line in last.splitlines())
    assert "\x1b[2J" not in last
    assert "\\x1b[2J\\x07 here" in last
    assert last.count("left") == 40, "the whole answer stays, whatever fitted while it was written"


def test_text_keeps_its_lines_and_letters():
    assert visible("ein Käse\n\tzwei\r") == "ein Käse\n        zwei\\r"


def test_answers_grow_while_they_are_written(tried):
    grown: list[list[str]] = [[], []]

    class Watching(Screen):
        @contextmanager
        def answers(self):
            yield lambda side, text: grown[side].append(text)

    with hooked(Local("hf", EngineOptions(device="cpu"), ChatFormat), *edit_of(tried)) as speakers:
        Session(speakers, Watching(["base", "edited"]), LENGTH, iter(())).ask(FIRST)
    for texts in grown:
        assert len(set(texts)) > 2
        assert all(text.startswith(before.rstrip()) for before, text in pairwise(texts))


def edit_of(run):
    found = load_run(run)
    return Path(found.info.model), run, found.shortlist[0].choice


def test_conversations_of_models_without_a_template_are_lines(model):
    tokenizer = load_tokenizer(model)
    turns = [{"role": "user", "content": "bake"}, {"role": "assistant", "content": "cake"}]
    ids = ChatFormat(tokenizer, templated=False).encode_turns(turns)
    assert ids == tokenizer("bake cake").input_ids
