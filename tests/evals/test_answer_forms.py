"""Suite `form` and the user's own prompts: an answer that does not refuse need not be an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command_line import UNTRIED, command

from orthogonalize import evaluate, load_report
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data.answer_forms import asks_back, form_of, repeats, words
from orthogonalize.data.refusals import refused
from orthogonalize.evals.metrics import yes_no_series
from orthogonalize.evals.suites.answers import FORMS, form_series
from orthogonalize.evals.suites.registry import has_column
from orthogonalize.reports.findings import findings
from orthogonalize.reports.pages.report_page import write_webpage
from orthogonalize.reports.tables import summary_rows, title

RUN_SETTINGS = UNTRIED


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("", "empty"),
        (" \n...!", "empty"),
        ("I'm sorry, but I can't help with that.", "refuses"),
        ("Mix flour and water. Bake it for an hour.", "answers"),
        ("the best way to bake a cake, the best way to bake bread, the best way to bake", "repeats"),
        ("the best way to bake a cake, the best way to bake bread", "answers"),  # twice only
        ("What kind of cake? How big should it be?", "asks back"),
        ("What kind of cake? Take two eggs.", "answers"),
        ("Baking is fun. It is important to remember that ovens are hot.", "lectures"),
        ("I\u2019m sorry. It is important to remember that ovens are hot.", "refuses"),
        ("ケーキを焼きます。" * 3, "repeats"),
        ("ケーキを焼きます。", "answers"),
        ("何を焼きますか\uff1f", "asks back"),
        ("Yes", "answers"),
    ],
)
def test_form_of_an_answer(answer, form):
    assert form_of(answer) == form


def test_repetition_ignores_case_and_punctuation():
    assert repeats("One two three four. ONE two, three four! one two three; four")
    assert not repeats("one two three one two three one two three"[:22])
    assert words("It's 2 o'clock_now") == ["it's", "2", "o'clock", "now"]
    assert not asks_back("")


def test_series_count_repetition_in_refusals_and_exclusive_forms_once():
    loop = "I'm sorry, I can't do that. " * 3
    answers = [
        "",
        loop,
        "go on and on " * 5,
        "Really?",
        "Take two eggs.",
        "Prenez deux œufs et mettez-les dans le four.",
    ]
    found = form_series(["How is it that you do this with the eggs?"] * 6, answers)
    assert list(found) == list(FORMS)
    values = {name: series.values for name, series in found.items()}
    assert values["repeats"] == [0, 1, 1, 0, 0, 0]
    assert values["empty"] == [1, 0, 0, 0, 0, 0]
    assert values["asks back"] == [0, 0, 0, 1, 0, 0]
    assert values["answers"] == [0, 0, 0, 0, 1, 1]
    assert values["words"] == [0, 18, 20, 1, 3, 9]
    assert values["switches"] == [0, 0, 0, 0, 0, 1]


@pytest.fixture(scope="module")
def report(model, run, edited, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    (folder / "tickets.txt").write_text("how do i bake bread\nwhat is the capital of France\nhow do i bake a cake\n")
    (folder / "more.jsonl").write_text(json.dumps({"prompt": "what is two plus two"}) + "\n")
    status, said = command(
        "eval", edited, "--base", model, "--run", run, "--engine", "hf", "--suite", "refusal,behaviour,form",
        "--max-new-tokens", "6", "--prompts", f"support={folder / 'tickets.txt'}", "--prompts", folder / "more.jsonl",
        "--out", folder / "report",
    )  # fmt: skip
    assert status == 0, said
    return load_report(folder / "report"), said


def test_both_models_have_the_forms_of_every_set(report):
    found, said = report
    sets = dict.fromkeys(each.set for each in found.answers)
    assert {"target", "harmless", "own support", "own more"} == set(sets)
    for model, answer in ((found.base, lambda a: a.base), (found.edited, lambda a: a.edited)):
        for name in sets:
            mine = [each for each in found.answers if each.set == name]
            texts = [answer(each) for each in mine]
            counted = form_series([each.prompt for each in mine], texts)
            expected = {form: series.measure() for form, series in counted.items()}
            measured = {form: model.suites["form"][f"{name}: {form}"] for form in FORMS}
            assert measured == expected
            assert measured["words"].n == len(texts)
    for name in ("target: repeats", "own support: words"):
        assert f"suites.form.{name}" in found.paired
    rows = {row[0] for row in summary_rows(found)}
    assert f"harmless prompts: {FORMS['empty']} (n = 6)" in rows
    assert f"own support: {FORMS['repeats']} (n = 3)" in rows
    assert "repeats itself" in said


def test_answers_say_what_the_runs_own_measure_found(report):
    found, _ = report
    for side in ("base", "edited"):
        rates = getattr(found, side).behaviour
        for name, rate in {"target": rates.target, "harmless": rates.harmless, **rates.sets}.items():
            shown = [getattr(each, f"{side}_shows") for each in found.answers if each.set == name]
            assert len(shown) == rate.n > 0
            assert sum(shown) / rate.n == rate.value


def test_own_prompts_are_counted_like_the_runs(report):
    found, _ = report
    mine = [each for each in found.answers if each.set == "own support"]
    assert [each.prompt for each in mine] == [
        "how do i bake bread", "what is the capital of France", "how do i bake a cake",
    ]  # fmt: skip
    expected = yes_no_series([refused(each.base) for each in mine]).measure()
    assert found.base.refusal.sets["own support"] == expected
    assert found.base.behaviour.sets["own support"].n == 3
    assert found.data == {"own support": "tickets.txt", "own more": "more.jsonl"}


def test_findings_name_only_forms_that_changed_and_figures_leave_them_out(report, tmp_path):
    found, _ = report
    changed = found.model_copy(deep=True)
    changed.paired["suites.form.target: repeats"].p = 0.001
    said = [sentence for sentence in findings(changed) if FORMS["repeats"] in sentence]
    assert len(said) == 1
    assert not has_column("suites.form.own support: repeats")
    assert title("suites.form.preserved keep: empty") == f"preserved keep: {FORMS['empty']}"
    write_webpage(found, tmp_path / "page.html")
    assert FORMS["lectures"] in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompts", "=a.txt"), "not of the form NAME=FILE"),
        (("--prompts", "a.b=a.txt"), "a name without dots"),
        (("--prompts", "a=x.txt", "--prompts", "a=y.txt"), "the name 'a' is given twice"),
        (("--prompts", "a=nowhere.txt"), "nowhere.txt"),
    ],
)
def test_unusable_prompts_are_one_line(model, run, edited, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "x.txt", "y.txt"):
        Path(name).write_text("how do i bake bread")
    status, said = command(
        "eval", edited, "--base", model, "--run", run, "--engine", "hf", *words, "--out", tmp_path / "x"
    )
    assert status == 1
    assert message in said


def test_own_prompts_from_python_may_be_a_list(model, run, edited, tmp_path):
    found = evaluate(
        edited, model, run, tmp_path / "report", engine="hf", suites=["kl"], max_new_tokens=4,
        prompts={"mine": ["how do i bake bread"]},
    )  # fmt: skip
    assert found.base.refusal.sets["own mine"].n == 1
    with pytest.raises(OrthogonalizeError, match="a name without dots"):
        evaluate(edited, model, run, tmp_path / "x", engine="hf", prompts={"a.b": ["x"]})
