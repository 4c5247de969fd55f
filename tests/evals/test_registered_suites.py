"""Suites and prompt sets that code outside the package registers, through `eval`, `sweep` and their reports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.benchmark_files import write
from helpers.command_line import UNTRIED, command

from orthogonalize.data.benchmarks import PROMPT_SETS, BenchmarkSet, PromptSet
from orthogonalize.evals.metrics import Series, yes_no_series
from orthogonalize.evals.plan import make_plan
from orthogonalize.evals.suites.base import SuiteContext, SuiteEntry
from orthogonalize.evals.suites.registry import DEFAULT_SUITES, SUITES, suite_names, suite_summaries
from orthogonalize.models.loading import load_tokenizer
from orthogonalize.reports.model_card import write_card
from orthogonalize.reports.schema import Measures, load_report
from orthogonalize.selection.run_folder import load_run

RUN_SETTINGS = UNTRIED
SOURCE = BenchmarkSet("made-up/questions", "test", ("question",))
KEYS = {f"suites.questions.{key}" for key in ("long", "loss", "words", "kl")}


@dataclass(frozen=True)
class Questions:
    """A suite with one series of each kind: whether answers are long, their loss, their length, a divergence."""

    prompts: list[list[int]]
    name: str = "questions"
    state: str = "1"

    @property
    def longest(self) -> int:
        return max(map(len, self.prompts)) + 4

    def measure(self, engine, memory) -> dict[str, Series]:
        answers = engine.answers(self.prompts, 4)
        losses = [-score.logprob for score in engine.scores(self.prompts, [[5]] * len(self.prompts))]
        return {
            "long": yes_no_series([len(ids) > 2 for ids in answers]),
            "loss": Series(kind="loss", values=losses, tokens=[1] * len(losses)),
            "words": Series(kind="score", values=[float(len(ids)) + 0.5 for ids in answers]),
            "kl": Series(kind="divergence", values=losses, tokens=[1] * len(losses)),
        }


def questions(context: SuiteContext) -> Questions:
    from orthogonalize.data.benchmarks import rows

    found = rows(SOURCE, context.data, context.limit)
    return Questions([context.chat.encode(row["question"].strip()) for row in found])


@pytest.fixture(scope="module", autouse=True)
def registered():
    titles = {"long": "long answers", "loss": "loss of a word", "words": "words per answer", "kl": "surprise"}
    SUITES.add(SuiteEntry("questions", "made-up questions", titles, questions, SOURCE, columns=("long", "loss", "kl")))
    source = BenchmarkSet("made-up/chores", "train", ("text",))
    PROMPT_SETS.add(PromptSet("chores", "Chores (all safe)", source, "text", sensitive=True, over_refusal=True))
    yield
    SUITES.remove("questions")
    PROMPT_SETS.remove("chores")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("data")
    sentences = [f"how do i bake a {thing}" for thing in ("cake", "pie", "soup", "wall", "car", "shirt")]
    write(home / "made-up/questions", [{"question": text} for text in sentences], "test")
    write(home / "made-up/chores", [{"text": text} for text in sentences])
    return home


@pytest.fixture(scope="module")
def measured(model, edited, run, folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report"
    status, said = command(
        "eval", edited, "--base", model, "--run", run, "--out", out, "--engine", "hf", "--max-new-tokens", "4",
        "--suite", "refusal,questions,chores", "--data", folder,
    )  # fmt: skip
    assert status == 0, said
    for text in ("long answers (n = 6)", "loss of a word (n = 6)", "words per answer", "refusal, Chores (all safe)"):
        assert text in said
    return out


def test_a_registered_suite_reaches_report_json(measured):
    report = load_report(measured)
    assert report.suites == ["refusal", "questions", "chores"]
    stored = json.loads((measured / "report.json").read_text())
    kinds = {key: sorted(found) for key, found in stored["base"]["suites"]["questions"].items()}
    assert kinds == {
        "long": ["by_category", "ci95", "n", "unparseable", "value"],
        "loss": ["by_category", "ci95", "n", "perplexity", "tokens", "value"],
        "words": ["ci95", "n", "value"],
        "kl": ["ci95", "n", "tokens", "value"],
    }
    for side in (report.base, report.edited):
        assert set(side.flat()) >= KEYS
        assert Measures.model_validate_json(side.model_dump_json()) == side
    assert set(report.paired) >= KEYS
    copy = " (a local copy)"
    assert report.data == {"questions": f"made-up/questions test{copy}", "chores": f"made-up/chores train{copy}"}


def test_a_registered_suite_reaches_the_page_and_the_card(measured, edited, tmp_path):
    from orthogonalize.edits.recipe import load_recipe

    write_card(tmp_path, load_recipe(edited), report=load_report(measured))
    for text in ((measured / "report.html").read_text(), (tmp_path / "README.md").read_text()):
        for name in ("long answers (n = 6)", "loss of a word (n = 6)", "words per answer (n = 6)", "surprise (n = 6)"):
            assert name in text
        assert "refusal, Chores (all safe) (n = 6)" in text
    page = (measured / "report.html").read_text()
    assert '<option value="chores">Chores (all safe)</option>' in page
    assert "<li>Loss of a word" in page
    assert "<li>surprise: " in page
    assert page.count("<summary>chores prompt") == 6  # sensitive


def test_a_registered_suite_reaches_the_sweep_table(model, run, folder, tmp_path):
    from orthogonalize.reports.sweep import Sweep, sweep_columns

    status, said = command(
        "sweep", model, "--run", run, "--out", tmp_path / "out", "--engine", "hf", "--max-new-tokens", "4",
        "--suite", "refusal,questions,chores", "--data", folder, "--methods", "ablate", "--scopes", "all",
    )  # fmt: skip
    assert status == 0, said
    found = Sweep.model_validate_json((tmp_path / "out" / "sweep.json").read_text())
    columns = sweep_columns(found)
    assert columns[-5:] == ["refusal, Chores (all safe)", "long answers", "loss of a word", "surprise", ""]
    assert "words per answer" not in columns
    assert set(found.base.suites["questions"]) == {"long", "loss", "words", "kl"}


def test_a_registered_suite_reports_bad_rows_as_its_source_s(model, run, tmp_path):
    write(tmp_path / "made-up/questions", [{"question": 3}], "test")
    status, said = command(
        "eval", model, "--base", model, "--run", run, "--out", tmp_path / "out", "--engine", "hf",
        "--suite", "questions", "--data", tmp_path,
    )  # fmt: skip
    assert status == 1
    assert "made-up/questions test" in said


def test_registered_names_are_in_help_and_in_messages(model, run, tmp_path):
    status, said = command("eval", "--help")
    assert status == 0
    words = "".join(said.split())
    for name in suite_names():
        assert name in words
    _, said = command("eval", model, "--base", model, "--run", run, "--out", tmp_path / "out", "--suite", "magic")
    assert f"unknown suite 'magic'; available: {', '.join(suite_names())}" in said


@pytest.mark.parametrize("name", ["", "a.b", "a,b", "a:b", "a b"])
def test_a_suite_s_name_must_fit_the_command_line_and_keys(name):
    with pytest.raises(ValueError, match="a suite cannot be called"):
        SuiteEntry(name, "", {})


def test_measures_without_registered_suites_are_stored_as_before():
    stored = json.loads(Measures.of({"choices.mmlu": yes_no_series([True, False])}).model_dump_json())
    assert list(stored) == ["behaviour", "refusal", "judges", "loss", "kl", "choices", "tasks"]
    assert Measures.model_validate(stored).suites == {}


def test_suites_are_measured_in_the_registry_s_order(model, run, folder):
    tokenizer = load_tokenizer(model)
    plan = make_plan(load_run(run), tokenizer, ["questions", "kl", "loss"], 4, data=folder)
    assert [suite.name for suite in plan.suites] == ["loss", "kl", "questions"]
    assert set(DEFAULT_SUITES) < set(suite_names())


def test_the_registry_does_not_import_torch():
    code = "import sys, orthogonalize.evals.suites.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_documentation_lists_every_suite_and_prompt_set():
    text = (Path(__file__).parents[2] / "docs" / "measuring.md").read_text()
    for name, (summary, source) in suite_summaries().items():
        if name not in ("questions", "chores"):
            assert f"| `{name}` | {summary} | {source or 'the run'} |" in text
