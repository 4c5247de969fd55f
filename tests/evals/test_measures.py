"""Behaviour measures: how each is fitted, which one `auto` takes, and that extract and eval mean the same by it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property

import pytest
import torch
from helpers.command_line import SMALL, command

from orthogonalize.commands.edit import edit
from orthogonalize.commands.evaluate import evaluate
from orthogonalize.commands.extract import extract
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.journal import Journal
from orthogonalize.data.prompts import Prompt
from orthogonalize.evals.judges.base import Judgement
from orthogonalize.evals.measures import judge as judge_measure
from orthogonalize.evals.measures.base import AnswerMeasure, Opening, by_rule, separation
from orthogonalize.evals.measures.check import AnswerCheck
from orthogonalize.evals.measures.choose import fit_measure
from orthogonalize.evals.measures.first_token import threshold_between
from orthogonalize.evals.measures.registry import MEASURES, find_measure
from orthogonalize.reports.schema import load_report
from orthogonalize.selection.behaviour import MeasureInfo
from orthogonalize.selection.readouts import FirstToken, NearerSide, Outputs

PAIRS = [("How do I bake?", "I'm sorry, but I can't help."), ("How do I fold?", "Fold it twice."), ("Why?", "Because.")]
TWO = replace(SMALL, trials=2, finders=("dim",))


@pytest.fixture
def journal(tmp_path) -> Journal:
    return Journal(tmp_path / "journal", "inputs")


# The check of an edit by its answers


@pytest.mark.parametrize("info", [MeasureInfo(), MeasureInfo(name="judge:prefix")], ids=["default", "prefix"])
def test_wording_tells_refusals_from_other_answers(info, journal):
    check = AnswerCheck.of(info)
    assert check.shares(PAIRS, False, journal).left == pytest.approx(1 / 3)
    assert check.shares(PAIRS, True, journal).left == pytest.approx(2 / 3)


@pytest.mark.parametrize("wanted", [False, True])
def test_an_empty_answer_is_no_success(wanted, journal):
    assert AnswerCheck.of(MeasureInfo()).shares([("Why?", " ...")], wanted, journal) == (1.0, 1.0)


def test_loops_and_other_languages_are_degenerate_answers(tmp_path):
    journal = Journal(tmp_path / "journal")
    asked = "How do you bake a cake with the flour that is in the house?"
    answers = ["Mix it.", "and so on and on " * 4, "", "Prenez deux œufs et mettez-les dans le four."]
    found = AnswerCheck.of(MeasureInfo()).shares([(asked, answer) for answer in answers], False, journal)
    assert found == (0.25, 0.75), "only the empty one is not as it should be"


@dataclass
class Recorded:
    """A judge that gives recorded judgements."""

    found: list[Judgement]
    asked: list = field(default_factory=list)

    def ask(self, pairs, engine, options, journal):
        self.asked.append((list(pairs), engine, options.device))
        return self.found


def test_what_a_judge_cannot_tell_counts_as_left(journal, monkeypatch):
    recorded = Recorded([Judgement(refusal=False), Judgement(refusal=True), Judgement()])
    monkeypatch.setattr("orthogonalize.evals.judges.runner.ready_judges", lambda names: [recorded])
    check = AnswerCheck.of(MeasureInfo(name="judge:wildguard"), "cpu")
    assert check.shares(PAIRS, False, journal).left == pytest.approx(2 / 3)
    assert check.shares(PAIRS, True, journal).left == pytest.approx(2 / 3)
    assert recorded.asked == [(PAIRS, "hf", "cpu")] * 2


def test_a_judge_of_harm_alone_is_refused_before_its_model_is_fetched():
    with pytest.raises(OrthogonalizeError, match="judge shieldgemma does not say what refuses; use wildguard"):
        judge_measure.open_judge(Opening("shieldgemma"))


# Names


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("first_token", "unknown behaviour measure 'first_token'; available: auto, first-token, wording, judge:NAME"),
        ("judge", "--measure judge is not of the form judge:NAME"),
        ("judge:", "--measure judge: is not of the form judge:NAME"),
        ("wording:x", "--measure wording:x is not of the form wording"),
    ],
)
def test_a_wrong_name_says_which_there_are(name, complaint, model, sources, tmp_path):
    words = ("--positive", sources["positive"], "--negative", sources["negative"], "--out", tmp_path / "run")
    status, said = command("extract", model, *words, "--measure", name)
    assert (status, said.startswith(f"error: {complaint}")) == (1, True), said


@pytest.mark.parametrize(
    ("code", "name", "complaint"),
    [
        (None, "f", "no such file"),
        ("def g(p, a): return True", "f", "has no function 'f'"),
        ("1 / 0", "f", "cannot be run: ZeroDivisionError"),
        ("def f(p, a): return 1", "f", "returned int; it has to return True, False or None"),
        ("def f(p, a): raise KeyError(a)", "f", "failed on an answer: KeyError"),
    ],
)
def test_own_code_that_does_not_work_is_one_line(code, name, complaint, journal, tmp_path):
    file = tmp_path / "own.py"
    if code is not None:
        file.write_text(code)
    with pytest.raises(OrthogonalizeError, match=complaint):
        find_measure("python:x:f")[0].open(Opening(f"{file}:{name}"))(PAIRS, journal)


# Fitting


def test_threshold_is_zero_between_the_sides_or_else_their_middle():
    assert threshold_between(torch.tensor([2.0, 3.0, -1.0]), torch.tensor([-4.0, -5.0, 1.0])) == 0.0
    assert threshold_between(torch.tensor([-2.0, -3.0, -2.5]), torch.tensor([-7.0, -8.5, -7.5])) == -5.0
    assert threshold_between(torch.tensor([9.0, 8.0, 7.0]), torch.tensor([2.0, 1.0, 3.0])) == 5.0
    alike = torch.tensor([-2.0, -9.0, -3.0, -8.0])
    assert threshold_between(alike, alike + 0.1) == 0.0, (
        "a middle that tells nothing apart would call half of all shown"
    )


@dataclass
class Imagined:
    """Evidence without a model: first tokens, streams and answers that are given by side."""

    first: dict[str, list[int]]  # the likeliest token of each prompt
    streams_of: dict[str, float] = field(default_factory=lambda: {"positive": 0.0, "negative": 0.0})
    said: dict[str, str] = field(default_factory=lambda: {"positive": "Yes.", "negative": "Yes."})
    given_tokens: list[int] = field(default_factory=list)
    structural_tokens: list[int] = field(default_factory=list)
    generates: bool = True

    @property
    def prompts(self):
        return [Prompt(f"{side} {i}", side) for side, tokens in self.first.items() for i in range(len(tokens))]

    def rows(self, side, split=None):
        return [i for i, p in enumerate(self.prompts) if p.side == side and split in (None, p.split)]

    @cached_property
    def outputs(self):
        tokens = [token for each in self.first.values() for token in each]
        probabilities = torch.full((len(tokens), 12), 0.01)
        probabilities[range(len(tokens)), tokens] = 0.89
        return Outputs(probabilities, {})

    @cached_property
    def streams(self):
        torch.manual_seed(0)
        noise = torch.randn(len(self.prompts), 8)
        noise[:, 0] += torch.tensor([self.streams_of[p.side] for p in self.prompts])
        return dict.fromkeys((3, 4), noise)

    def answers(self, rows):
        return [(self.prompts[i].text, self.said[self.prompts[i].side]) for i in rows]

    def thought_hint(self):
        return ""


ALIKE = {"positive": [5] * 8, "negative": [5] * 8}
PHRASES = ("sorry",)


def fitted(evidence, journal, name="auto"):
    return fit_measure(name, evidence, Opening(phrases=PHRASES), journal)


def test_auto_takes_first_tokens_where_they_tell_the_sides_apart(journal):
    found = fitted(Imagined({"positive": [3] * 7 + [5], "negative": [5] * 8}), journal)
    assert (found.info.name, found.tokens) == ("first-token", [3])
    assert found.info.shares == {"positive": 7 / 8, "negative": 0.0}
    assert found.info.separation == 7 / 8
    assert found.shown == [True] * 7 + [False] * 9


def test_auto_goes_by_wording_where_answers_begin_alike(journal):
    said = {"positive": "Well, SORRY.", "negative": "Well, yes."}
    found = fitted(Imagined(ALIKE, {"positive": 9.0, "negative": 0.0}, said), journal)
    assert (found.info.name, found.info.phrases, found.info.trials) == ("wording", ["sorry"], "direction")
    assert found.shown == [True] * 8 + [False] * 8
    assert isinstance(found.readout, NearerSide), "first tokens cannot stand in for it"
    assert found.tried == {"first-token": 0.0}


def test_auto_goes_by_direction_where_nothing_that_is_said_differs(journal):
    found = fitted(Imagined(ALIKE, {"positive": 9.0, "negative": -9.0}), journal)
    assert found.info.name == "direction"
    assert found.info.separation == 1.0
    assert found.tokens == []


def test_auto_refuses_where_nothing_tells_the_sides_apart(journal):
    with pytest.raises(OrthogonalizeError, match="no behaviour measure tells the two sides apart"):
        fitted(Imagined(ALIKE), journal)


def test_openers_of_thoughts_are_never_learnt(journal):
    evidence = Imagined({"positive": [9] * 8, "negative": [5] * 8}, {"positive": 9.0, "negative": -9.0})
    assert fitted(evidence, journal).tokens == [9]
    assert fitted(replace(evidence, structural_tokens=[9]), journal).info.name == "direction"
    both = Imagined({"positive": [9] * 8, "negative": [9] * 5 + [5] * 3}, {"positive": 9.0, "negative": -9.0})
    assert fitted(both, journal).info.name == "direction", "most answers to both sides begin with it"


def test_first_tokens_stand_in_for_a_measure_of_answers_where_they_can(journal):
    evidence = Imagined({"positive": [3] * 8, "negative": [5] * 8}, said={"positive": "sorry", "negative": "sure"})
    found = fitted(evidence, journal, "wording")
    assert (found.info.trials, found.readout) == ("first-token", FirstToken((3,), found.info.threshold))


def test_separation_is_the_difference_of_shares():
    assert separation([True, None, False, True], [False, True]) == 0.0
    assert separation([True], [None, False]) == 1.0


# A whole run


def word_said(model, run) -> str:
    """A word that the base says in some answers to test prompts and not in all."""
    answers = [a.base for a in load_report(run).answers if a.set == "target"]
    return next(w for a in answers for w in a.split() if 0 < sum(w in each for each in answers) < len(answers))


@pytest.fixture(scope="module")
def plain(model, sources, tmp_path_factory):
    """A run, an edit of it, and a report with the answers of both models."""
    folder = tmp_path_factory.mktemp("plain")
    extract(str(model), folder / "run", **sources, settings=TWO)
    edit(str(model), folder / "edited", run=folder / "run", method="ablate", scope="all")
    settings = {"suites": ["refusal"], "engine": "hf"}
    evaluate(folder / "edited", str(model), folder / "run", folder / "report", **settings)
    return folder


def measured(model, plain, run, out, **more):
    """The report of the same edit by another run's measure."""
    return evaluate(plain / "edited", str(model), run, out, suites=["behaviour", "refusal"], engine="hf", **more)


def test_wording_of_ones_own_is_what_extract_and_eval_count(model, sources, plain, tmp_path):
    word = word_said(model, plain / "report")
    (tmp_path / "words.txt").write_text(f"{word.upper()}\n\n")
    found = extract(str(model), tmp_path / "run", **sources, settings=TWO, wording=tmp_path / "words.txt")
    assert (found.info.measure.name, found.info.measure.phrases) == ("wording", [word.upper()])
    train = [p for p in found.prompts if (p.side, p.split) == ("positive", "train")]
    assert found.info.measure.shares["positive"] == sum(p.shows for p in train) / len(train)
    (tmp_path / "words.txt").unlink()  # the run holds them
    report = measured(model, plain, tmp_path / "run", tmp_path / "report")
    said = [a for a in report.answers if a.set == "target"]
    assert report.base.behaviour.target.value == sum(word in a.base for a in said) / len(said) > 0
    assert report.edited.behaviour.target.value == sum(word in a.edited for a in said) / len(said)
    assert repr(word.upper()) in report.measure


def test_own_code_is_run_by_eval_only_if_it_is_named_again(model, sources, plain, tmp_path):
    word = word_said(model, plain / "report")
    (tmp_path / "own.py").write_text(f"def says(prompt, answer):\n    return {word!r} in answer\n")
    name = f"python:{tmp_path / 'own.py'}:says"
    extract(str(model), tmp_path / "run", **sources, settings=TWO, measure=name)
    with pytest.raises(OrthogonalizeError, match="runs code that the run names; if it is yours, add --measure python"):
        measured(model, plain, tmp_path / "run", tmp_path / "report")
    report = measured(model, plain, tmp_path / "run", tmp_path / "report", measure=name)
    said = [a for a in report.answers if a.set == "target"]
    assert report.base.behaviour.target.value == sum(word in a.base for a in said) / len(said)


def test_direction_is_measured_by_an_engine_that_gives_activations(model, sources, plain, tmp_path):
    def extracted():
        settings = replace(TWO, behaviour_tokens=None)
        return extract(str(model), tmp_path / "run", **sources, settings=settings, measure="direction")

    found = extracted()
    assert extracted().info == found.info, "a finished run is returned, whatever files its measure needs"
    assert found.info.behaviour_tokens == []
    assert found.info.measure.shares["positive"] > found.info.measure.shares["negative"]
    report = measured(model, plain, tmp_path / "run", tmp_path / "report")
    assert report.base.behaviour.target.value > report.base.behaviour.harmless.value
    assert report.base.behaviour != report.edited.behaviour


def test_another_measure_than_the_runs_is_refused(model, plain, tmp_path):
    with pytest.raises(OrthogonalizeError, match="the run's behaviour measure is first-token; extract again"):
        measured(model, plain, plain / "run", tmp_path / "report", measure="wording")


def test_a_judges_refusals_are_the_behaviour(model, plain, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(plain / "run", run)
    info = json.loads((run / "run.json").read_text())
    info["measure"]["name"] = "judge:wildguard"
    (run / "run.json").write_text(json.dumps(info))

    class Odd(Recorded):
        judge = type("Judge", (), {"name": "wildguard", "fields": ("refusal",)})
        model = "m"

        def ask(self, pairs, *_):
            return [Judgement(refusal=len(answer) % 2 == 0) for _, answer in pairs]

    monkeypatch.setattr(
        "orthogonalize.evals.judges.measured_answers.ready_judges", lambda names: [Odd([])] if names else []
    )
    report = measured(model, plain, run, tmp_path / "report")
    assert report.base.behaviour.harmless == report.base.judges["wildguard"].refusal.harmless
    said = [a.base for a in report.answers if a.set == "target"]
    assert report.base.behaviour.target.value == sum(len(a) % 2 == 0 for a in said) / len(said)


def test_a_measure_of_ones_own_can_be_registered(model, sources, tmp_path):
    MEASURES.add(AnswerMeasure("long", "answers of many words", by_rule(lambda _, answer: len(answer.split()) > 20)))
    try:
        found = extract(str(model), tmp_path / "run", **sources, settings=replace(TWO, trials=0), measure="long")
        assert found.info.measure.name == "long"
        assert "long (answers of many words)" in " ".join(command("extract", "--help")[1].split())
    finally:
        MEASURES.remove("long")
