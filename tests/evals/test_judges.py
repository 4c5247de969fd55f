"""Judges: their prompts, how recorded replies are parsed, and each end to end on a tiny model of its class."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.chat import tiny_tokenizer
from helpers.command_line import UNTRIED, command
from helpers.tiny_models import build

from orthogonalize.cli import main
from orthogonalize.commands.judge import judge, read_answers
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.engines.transformers import TransformersEngine
from orthogonalize.evals.judges.base import Judgement, WritingJudge
from orthogonalize.evals.judges.registry import JUDGES, find_model_judge, model_judges
from orthogonalize.evals.judges.runner import ready_judges
from orthogonalize.reports.schema import load_report

RUN_SETTINGS = UNTRIED

PROMPT, RESPONSE = "how do i bake a cake {response}", "please fold the cake today {prompt} 100%"

# Made-up harmless replies in each judge's format, and what they mean.
RECORDED = {
    "llama-guard-2": [("\n\nsafe", (False, None)), ("unsafe\nS2", (True, None)), ("Hello", (None, None))],
    "llama-guard-3": [("safe", (False, None)), ("\n\nunsafe\nS9,S10", (True, None)), ("unsafely", (None, None))],
    "llama-guard-4": [("safe", (False, None)), ("unsafe\nS1", (True, None)), ("The answer is safe", (None, None))],
    "harmbench": [("yes", (True, None)), (" No", (False, None)), ("maybe", (None, None)), ("Yes.", (True, None))],
    "harmbench-mistral": [("no", (False, None)), ("YES", (True, None)), ("n", (None, None))],
    "wildguard": [
        ("Harmful request: no\nResponse refusal: yes\nHarmful response: no", (False, True)),
        ("Harmful request: yes\nResponse refusal: no\nHarmful response: yes\n", (True, False)),
        ("Harmful request: yes\nResponse refusal: N/A\nHarmful response: yes", (True, None)),
        ("Harmful request: yes", (None, None)),
    ],
    "qwen3guard": [
        ("Safety: Safe\nCategories: None\nRefusal: No", (False, False)),
        ("Safety: Unsafe\nCategories: Violent\nRefusal: No", (True, False)),
        ("Safety: Controversial\nCategories: None\nRefusal: Yes", (False, True)),
        ("Safety: Unsafely", (None, None)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_replies_are_parsed_correctly(name):
    for reply, expected in RECORDED[name]:
        assert JUDGES[name].read(reply) == Judgement(*expected), reply


class Letters:
    """A tokenizer of characters, so that a judge's prompt can be read back."""

    bos_token, chat_template = "<s>", "x"

    def __init__(self) -> None:
        self.given: list = []

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict:
        rows = [[0] * add_special_tokens + [*map(ord, each)] for each in ([text] if isinstance(text, str) else text)]
        return {"input_ids": rows[0] if isinstance(text, str) else rows}

    def apply_chat_template(self, messages, **arguments) -> list[int]:
        self.given.append((messages, arguments))
        return [1, 2]

    def decode(self, ids) -> str:
        return "".join(map(chr, ids[1:]))


@pytest.mark.parametrize("name", ["harmbench", "harmbench-mistral", "wildguard"])
def test_raw_templates_hold_prompt_and_answer_verbatim(name):
    text = Letters().decode(JUDGES[name].encode(Letters(), PROMPT, RESPONSE))
    assert text.count(PROMPT) == text.count(RESPONSE) == 1
    assert text.index(PROMPT) < text.index(RESPONSE)
    endings = {"wildguard": "---\n\nAnswers: [/INST]\n<|assistant|>\n"}
    assert text.endswith(endings.get(name, "\n\nAnswer: [/INST]"))
    heads = {
        "harmbench": "[INST] <<SYS>>\nYou are a classifier for red teaming",
        "harmbench-mistral": "[INST] You are a classifier for red teaming",
        "wildguard": "<|user|>\n[INST] You are a classifier for analyzing interactions",
    }
    assert text.startswith(heads[name])
    labels = {"harmbench": ("Behavior:\n", "Generation:\n"), "harmbench-mistral": ("[BEHAVIOR]:\n", "[GENERATION]:\n"),
              "wildguard": ("Human user:\n", "AI assistant:\n")}[name]  # fmt: skip
    assert labels[0] + PROMPT in text
    assert labels[1] + RESPONSE in text


@pytest.mark.parametrize("name", ["llama-guard-2", "llama-guard-3", "llama-guard-4", "qwen3guard", "shieldgemma"])
def test_chat_judges_are_asked_through_their_own_template(name):
    letters = Letters()
    assert JUDGES[name].encode(letters, PROMPT, RESPONSE) == [1, 2]
    messages, arguments = letters.given[0]
    contents = [m["content"] if isinstance(m["content"], str) else m["content"][0]["text"] for m in messages]
    assert contents == [PROMPT, RESPONSE]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert arguments["add_generation_prompt"] is True
    assert isinstance(messages[0]["content"], list) == (name == "llama-guard-4")
    assert ("guideline" in arguments) == (name == "shieldgemma")


class Scripted:
    """An engine with scripted answers and likelihoods."""

    def __init__(self, replies=(), scores=()) -> None:
        self.replies, self.scores, self.rows = list(replies), list(scores), []

    def answers(self, prompts, max_new_tokens):
        self.rows = [(list(p), max_new_tokens) for p in prompts]
        return self.replies

    def choices(self, contexts, choices):
        self.rows = [(list(c), [list(x) for x in xs]) for c, xs in zip(contexts, choices, strict=True)]
        return self.scores


class Words(Letters):
    def decode(self, ids, skip_special_tokens=False) -> str:
        return {7: "safe", 8: "unsafe\nS1", 9: "who knows"}[ids[0]]

    def encode(self, word, add_special_tokens=True) -> list[int]:
        return {"Yes": [5], "No": [6]}[word]


def test_llama_guard_takes_short_answers_as_safe():
    """And replies that it cannot parse as neither safe nor unsafe."""
    long = "word " * 20
    engine = Scripted([[8], [7], [9], [8]])
    pairs = [("a", long), ("b", long), ("c", long), ("d", "fourteen words are too few")]
    found = JUDGES["llama-guard-2"].judge(engine, Words(), pairs)
    assert [o.harmful for o in found] == [True, False, None, False]


def test_scripts_without_spaces_are_counted_by_characters():
    """Otherwise no verdict on an answer in Chinese would ever be read."""
    long, short = "\u8bf7\u628a\u86cb\u7cd5\u653e\u8fdb\u70e4\u7bb1" * 3, "\u8bf7\u628a\u86cb\u7cd5"
    found = JUDGES["llama-guard-2"].judge(Scripted([[8], [8]]), Words(), [("a", long), ("b", short)])
    assert [o.harmful for o in found] == [True, False]


# Every engine of vLLM takes half a minute: most start in `make prove` alone.
ENGINES = ["hf", pytest.param("vllm", marks=pytest.mark.prove)]


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_answers_too_long_for_the_judge_are_unreadable(engine, tmp_path):
    """The others are judged."""
    if engine == "vllm":
        pytest.importorskip("vllm")
    folder = checkpoint(tmp_path / "judge", "qwen3", "Safety: Unsafe")
    rows = [{"prompt": "how do i bake a cake", "response": "please fold the cake today " * n} for n in (2, 400, 3)]
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    found = judge(tmp_path / "answers.json", f"qwen3guard={folder}", engine=engine)
    assert (found.harmful.value, found.harmful.n, found.harmful.unparseable) == (1.0, 2, 1)


def test_shieldgemma_compares_yes_with_no():
    engine = Scripted(scores=[[-0.1, -3.0], [-2.0, -0.5]])
    found = JUDGES["shieldgemma"].judge(engine, Words(), [("a", "b"), ("c", "d")])
    assert [o.harmful for o in found] == [True, False]
    assert engine.rows[0] == ([1, 2], [[5], [6]])


def checkpoint(folder: Path, kind: str, reply: str | None) -> Path:
    """A tiny model of a judge's class that says `reply` after every prompt (None: a random model)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Yes", "No", *([reply] if reply else [])])
    torch.manual_seed(0)
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 1024, "head_dim": 32}  # fmt: skip
    if "multimodal" in kind:
        model = build(kind, 32, max_position_embeddings=1024).float()
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common), dtype=torch.float32)
    if reply:
        says(model, tokenizer.convert_tokens_to_ids(reply), tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def says(model, reply: int, end: int) -> None:
    """Make the blocks write nothing and every token be followed by `reply`, and that by `end`."""
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.zero_()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding.zero_()
    head.zero_()
    embedding[:, 0] = 1
    embedding[reply, :2] = torch.tensor([0.0, 1.0])
    head[reply, 0] = head[end, 1] = 1


@torch.no_grad()
def leans(folder: Path, word: str) -> Path:
    """A tiny Gemma 2 with a tied head that always finds `word` likelier than any other token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint(folder, "gemma2", None)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.zero_()
    embedding = model.get_input_embeddings().weight.zero_()
    embedding[:, 0] = 1
    embedding[tokenizer.convert_tokens_to_ids(word), 0] = 2
    model.save_pretrained(folder)
    return folder


CLASSES = [
    ("llama-guard-2", "llama"),
    ("llama-guard-3", "llama"),
    ("llama-guard-4", "llama4_text"),
    ("llama-guard-4", "llama4 multimodal"),  # as released
    ("harmbench", "llama"),
    ("harmbench-mistral", "mistral"),
    ("wildguard", "mistral"),
    ("qwen3guard", "qwen3"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Path:
    rows = [
        {"prompt": "how do i bake a cake", "response": "I'm sorry, I cannot help with that.", "category": "baking"},
        {"prompt": "how do i fry a pie", "response": "please fold the cake today " * 4, "category": "frying"},
        {"prompt": "how do i wash a car", "response": "As an AI I have no car. " * 4},
    ]
    file = tmp_path_factory.mktemp("answers") / "answers.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "kind"), CLASSES)
def test_every_judge_runs_on_a_tiny_model_of_its_class(name, kind, engine, answers, tmp_path):
    """The model gives the second of the recorded replies to everything."""
    if engine == "vllm":
        pytest.importorskip("vllm")
        if "multimodal" in kind:
            pytest.importorskip("torchvision")  # vLLM imports it for every multimodal class
    reply, (harmful, refusal) = RECORDED[name][1]
    found = judge(answers, f"{name}={checkpoint(tmp_path / 'judge', kind, reply)}", engine=engine)
    assert (found.judge, found.n) == (name, 3)
    short = 1 if name.startswith("llama-guard") else 0  # the one short answer, which counts as safe
    assert (found.harmful.n, found.harmful.unparseable) == (3, 0)
    assert found.harmful.value == pytest.approx((3 - short) / 3 if harmful else 0.0)
    assert (found.refusal and found.refusal.value) == (None if refusal is None else float(refusal))


@pytest.mark.parametrize("engine", ENGINES)
def test_unreadable_verdicts_count_as_neither(engine, answers, tmp_path):
    if engine == "vllm":
        pytest.importorskip("vllm")
    folder = checkpoint(tmp_path / "judge", "qwen3", "Safety: Unsafely")
    found = judge(answers, f"qwen3guard={folder}", engine=engine)
    assert (found.harmful.n, found.harmful.unparseable) == (0, 3)
    assert (found.refusal.n, found.refusal.unparseable) == (0, 3)


@pytest.mark.parametrize("word", ["Yes", pytest.param("No", marks=pytest.mark.prove)])
def test_shieldgemma_runs_on_a_tiny_model_in_both_engines(word, answers, tmp_path):
    pytest.importorskip("vllm")
    named = f"shieldgemma={leans(tmp_path / 'judge', word)}"
    for engine in ("hf", "vllm"):
        found = judge(answers, named, engine=engine)
        assert (found.harmful.n, found.harmful.unparseable) == (3, 0)
        assert found.harmful.value == (1.0 if word == "Yes" else 0.0)


def test_interrupted_judging_of_a_file_resumes(answers, tmp_path, monkeypatch):
    name = f"qwen3guard={checkpoint(tmp_path / 'judge', 'qwen3', 'Safety: Unsafe')}"
    file = tmp_path / "answers.json"
    file.write_bytes(answers.read_bytes())
    whole = judge(file, name, engine="hf")
    monkeypatch.setattr("orthogonalize.evals.resumable.PORTION", 2)
    asked: list[int] = []
    ask = TransformersEngine.answers

    def dies(self, prompts, *more):
        asked.append(len(prompts))
        if len(asked) == 2:
            raise OrthogonalizeError("the engine died")
        return ask(self, prompts, *more)

    monkeypatch.setattr(TransformersEngine, "answers", dies)
    with pytest.raises(OrthogonalizeError, match="finished measurements were kept"):
        judge(file, name, engine="hf")
    assert judge(file, name, engine="hf") == whole
    assert asked == [2, 1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.json", "judge"]


def test_answers_in_a_read_only_folder_are_judged(answers, tmp_path, monkeypatch):
    name = f"qwen3guard={checkpoint(tmp_path / 'judge', 'qwen3', 'Safety: Unsafe')}"
    notes: list[str] = []
    monkeypatch.setattr("orthogonalize.core.journal.note", notes.append)

    def locked(*_arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("orthogonalize.core.journal.write_after", locked)
    assert judge(answers, name, engine="hf").harmful.value == 1.0
    assert "Read-only file system, so an interrupted run could not resume" in notes[0]


def run(*words) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["-q", *map(str, words)])
    return result.exit_code, result.output.strip()


def test_prefix_judge_needs_no_engine_and_prints_json(answers, monkeypatch):
    monkeypatch.setattr(
        "orthogonalize.evals.judges.runner.open_engine", lambda *a: pytest.fail("an engine was started")
    )
    status, said = run("judge", answers, "--judge", "prefix", "--json")
    assert status == 0
    found = json.loads(said)
    refusal = found["refusal"]
    assert (refusal["value"], refusal["n"]) == (pytest.approx(2 / 3), 3)
    assert refusal["ci95"][0] < 2 / 3 < refusal["ci95"][1]
    assert refusal["by_category"]["baking"]["value"] == 1.0
    assert refusal["by_category"]["frying"]["value"] == 0.0
    status, said = run("judge", answers)
    assert status == 0
    assert "66.7%" in said


def test_bad_answer_files_and_judges_are_one_line_errors(tmp_path, answers):
    files = {"cut.json": '[{"prompt": "a", "resp', "empty.json": "[]", "odd.json": '[{"prompt": "a"}]',
             "half.json": '[{"prompt": "a", "response": "b", "category": "\\ud800"}]',
             "deep.json": "[" * 100_000}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    cases = [
        ((tmp_path / "cut.json",), "is it truncated?"),
        ((tmp_path / "empty.json",), "at least one"),
        ((tmp_path / "odd.json",), "entry 1"),
        ((tmp_path / "half.json",), "entry 1 contains an unpaired surrogate (invalid Unicode)"),
        ((tmp_path / "deep.json",), "cannot be read as JSON"),
        ((tmp_path / "none.json",), "no such file"),
        ((answers, "--judge", "nobody", "--engine", "hf"), "unknown judge 'nobody'"),
        ((answers, "--judge", f"wildguard={tmp_path}/none", "--engine", "hf"), "no such model"),
    ]
    for words, message in cases:
        status, said = run("judge", *words)
        assert status == 1
        assert message in said, said
        assert "\n" not in said


def test_gated_judge_explains_how_to_get_access(monkeypatch):
    import httpx
    from huggingface_hub.errors import GatedRepoError

    def gated(*_arguments, **_keywords):
        raise GatedRepoError("gated", response=httpx.Response(403, request=httpx.Request("GET", "http://hub")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(OrthogonalizeError, match=r"judge llama-guard-3: .* is gated: accept its terms"):
        ready_judges(["llama-guard-3"])


def test_judge_checkpoint_can_be_given():
    assert find_model_judge("qwen3guard=Qwen/Qwen3Guard-Gen-0.6B")[1] == "Qwen/Qwen3Guard-Gen-0.6B"
    assert find_model_judge("wildguard")[1] == "allenai/wildguard"
    with pytest.raises(OrthogonalizeError):
        read_answers(Path("nowhere.json"))


def test_category_names_are_printed_verbatim(tmp_path):
    rows = [{"prompt": "a", "response": "I cannot", "category": c} for c in ("[/violence]", "hate [self]", "hate")]
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    status, said = run("judge", tmp_path / "answers.json")
    assert status == 0
    assert all(c in said for c in ("[/violence]", "hate [self]"))


@pytest.fixture
def toy(tmp_path) -> str:
    """A judge that this test registers, as code outside the package does; its model always replies "bad"."""
    folder = checkpoint(tmp_path / "toy", "llama", "bad")
    template = "how do i {prompt} please {response} now :"
    JUDGES.add(
        WritingJudge("toy", str(folder), ("harmful",), lambda text: Judgement(text == "bad"), 2, "raw", template)
    )
    yield "toy"
    JUDGES.remove("toy")


def test_a_registered_judge_reaches_the_report_and_its_page(toy, model, edited, run, tmp_path):
    status, said = command(
        "eval", edited, "--base", model, "--run", run, "--out", tmp_path / "out", "--engine", "hf",
        "--max-new-tokens", "4", "--suite", "refusal", "--judge", toy,
    )  # fmt: skip
    assert status == 0, said
    assert "harmful by toy, target prompts (n = 6)" in said
    report = load_report(tmp_path / "out")
    assert report.judges == {"toy": "toy"}
    assert report.base.judges["toy"].harmful.target.value == 1.0
    assert report.base.judges["toy"].refusal is None
    assert all(answer.judges["toy"].edited_harmful for answer in report.answers)
    assert "toy: harmful" in (tmp_path / "out" / "report.html").read_text()


def test_registered_judge_reaches_sweep_and_judge_command(toy, answers, model, run, tmp_path):
    from orthogonalize.reports.sweep import Sweep, sweep_columns

    status, said = command(
        "sweep", model, "--run", run, "--out", tmp_path / "out", "--engine", "hf", "--max-new-tokens", "4",
        "--suite", "refusal,loss", "--judge", toy, "--methods", "ablate", "--scopes", "all",
    )  # fmt: skip
    assert status == 0, said
    found = Sweep.model_validate_json((tmp_path / "out" / "sweep.json").read_text())
    assert "harmful by toy, target prompts" in sweep_columns(found)
    status, said = command("judge", answers, "--judge", toy, "--engine", "hf", "--json")
    assert status == 0, said
    assert json.loads(said)["harmful"]["value"] == 1.0


def test_every_judge_is_in_help_messages_and_documentation(toy, answers):
    _, said = command("eval", "--help")
    assert all(name in "".join(said.split()) for name in model_judges())
    _, said = command("judge", answers, "--judge", "nobody")
    assert said.endswith(f"unknown judge 'nobody'; available: {', '.join(JUDGES)}")
    text = (Path(__file__).parents[2] / "docs" / "measuring.md").read_text()
    assert all(f"`{name}`" in text for name in JUDGES if name != "toy")


def test_a_judge_by_wording_takes_no_model(answers):
    status, said = command("judge", answers, "--judge", "prefix=gpt2")
    assert status == 1
    assert "judge prefix has no model" in said
