"""`compare`: two reports of a tiny model's edits, set side by side."""

from __future__ import annotations

import json

import pytest
from helpers.command_line import UNTRIED, command

from orthogonalize import compare, edit, evaluate
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.evals.metrics import compare as paired
from orthogonalize.evals.metrics import yes_no_series

RUN_SETTINGS = UNTRIED
HOW = {"engine": "hf", "max_new_tokens": 8}


@pytest.fixture(scope="module")
def reports(model, run, edited, tmp_path_factory):
    """Folders of two edits' reports, whose answers are made to differ in known ways."""
    folder = tmp_path_factory.mktemp("compared")
    edit(str(model), folder / "weaker", run=run, method="ablate", scope="one", strength=0.5)
    evaluate(edited, str(model), run, folder / "first", **HOW)
    evaluate(folder / "weaker", str(model), run, folder / "second", suites=["refusal", "loss"], **HOW)
    for name, every in (("first", 2), ("second", 3)):
        file = folder / name / "report.json"
        stored = json.loads(file.read_text())
        for number, answer in enumerate(stored["answers"]):
            answer["edited_refused"] = number % every == 0
        file.write_text(json.dumps(stored))
    return folder / "first", folder / "second"


def test_a_report_equals_itself(reports):
    same = compare(reports[0], reports[0] / "report.json")
    assert same.unlike == []
    assert [row[0] for row in same.rows]
    for name, _, first, second, apart in same.rows:
        assert first == second, name
        assert apart.startswith(("+0.0 points", "+0.0000")), (name, apart)


def test_refusals_are_compared_by_prompt(reports):
    found = compare(*reports)
    rows = {row[0]: row for row in found.rows}
    for name in ("target", "harmless"):
        flags = [
            [each.edited_refused for each in report.answers if each.set == name]
            for report in (found.first, found.second)
        ]
        expected = paired(*(yes_no_series(side) for side in flags))
        text = rows[f"refusal, {name} prompts"][-1]
        assert text.startswith(f"{100 * expected.difference:+.1f} points ["), text
        assert "McNemar" in text


def test_a_measure_of_one_report_alone_is_blank(reports):
    """The first has KL, which the second was not asked for; losses have no items to pair."""
    rows = {row[0]: row for row in compare(*reports).rows}
    kl = rows["KL to base, first token"]
    assert kl[2]
    assert kl[3:] == ("", "")
    loss = rows["cross-entropy, own answers"]
    assert loss[-1].endswith("(unpaired)")


def test_reports_measured_differently_say_so(reports, tmp_path):
    stored = json.loads((reports[1] / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(stored | {"max_new_tokens": 9, "base_model": "another"}))
    assert compare(reports[1], tmp_path).unlike == ["the base model", "the length of answers"]
    status, output = command("compare", reports[1], tmp_path)
    assert status == 0
    assert "not measured alike: the base model, the length of answers" in " ".join(output.split())


def test_reports_without_a_common_measure_are_refused(reports, tmp_path):
    stored = json.loads((reports[1] / "report.json").read_text())
    only = {"refusal": stored["edited"]["refusal"]}
    stored |= {"edited": {"loss": stored["edited"]["loss"]}, "base": {"loss": stored["base"]["loss"]}, "paired": {}}
    (tmp_path / "losses.json").write_text(json.dumps(stored))
    (tmp_path / "refusals.json").write_text(json.dumps(stored | {"edited": only, "base": only}))
    with pytest.raises(OrthogonalizeError, match="no measure in common"):
        compare(tmp_path / "losses.json", tmp_path / "refusals.json")
    with pytest.raises(OrthogonalizeError, match="no report at"):
        compare(tmp_path / "nothing", reports[0])
