"""`--json`: standard output is one JSON document, whose numbers are those of the files."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from helpers.command_line import UNTRIED

from orthogonalize import compare, load_recipe, load_report, load_run, rank, verify
from orthogonalize.cli import main
from orthogonalize.commands.command_line.as_json import echo_json
from orthogonalize.commands.demo import DemoResult

RUN_SETTINGS = UNTRIED
QUICK = ("--engine", "hf", "--max-new-tokens", "8", "--json")


def printed(*words):
    """The document on standard output; notes are shown, and must not be part of it."""
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="module")
def evaluated(model, run, edited, tmp_path_factory):
    """The folder of a report, and what eval printed."""
    out = tmp_path_factory.mktemp("json") / "report"
    return out, printed("eval", edited, "--base", model, "--run", run, "--out", out, "--suite", "refusal,loss", *QUICK)


def test_rank_prints_every_direction_in_its_new_order(run, tmp_path):
    found = load_run(run)
    strict = printed("rank", run, "--kl", "0.001", "--json")
    assert strict["unedited"] == found.info.base_score
    assert strict["unedited_ci95"].keys() == {"positive", "negative"}
    for side, (low, high) in strict["unedited_ci95"].items():
        assert low < strict["unedited"][side] < high
    assert strict["candidates"] == json.loads(json.dumps([c.row() for c in rank(found.candidates, kl=0.001)]))
    loose = printed("rank", run, "--kl", "1000", "--induce", "-1000", "--prune", "0", "--json")
    assert loose != strict


def test_rank_says_what_it_wrote_beside_the_document(run):
    before = (run / "candidates.json").read_bytes()
    try:
        assert printed("rank", run, "--write", "--json")["candidates"]
    finally:
        (run / "candidates.json").write_bytes(before)


def test_extract_prints_what_there_is_to_choose_from(model, sources, tmp_path):
    out = tmp_path / "run"
    sides = [word for side, source in sources.items() for word in (f"--{side}", source)]
    sizes = ["--train", "12", "--val", "4", "--test", "6", "--no-filter", "--trials", "4", "--finders", "dim"]
    words = ("extract", model, "--out", out, *sides, *sizes, "--behaviour-tokens", "sorry", "--device", "cpu", "--json")
    assert printed(*words, "--stage", "prompts") == {"run": str(out), "finished": False}
    found = printed(*words)
    stored = json.loads((out / "candidates.json").read_text())
    assert (found["run"], found["finished"]) == (str(out), True)
    assert found["candidates"] == stored["candidates"]
    assert [edit["pick"] for edit in found["edits"]] == list(range(1, len(stored["shortlist"]) + 1))
    listed = [stored["trials"][place] for place in stored["shortlist"]]
    assert [{name: edit[name] for name in trial} for edit, trial in zip(found["edits"], listed, strict=True)] == listed
    assert found["probes"] == stored["probes"]


def test_eval_prints_its_report_without_answers(evaluated):
    out, document = evaluated
    stored = json.loads((out / "report.json").read_text())
    assert stored.pop("answers")
    assert document == {"report": str(out), **stored}


def test_compare_prints_the_numbers_of_its_table(evaluated, tmp_path):
    out, _ = evaluated
    stored = json.loads((out / "report.json").read_text())
    for number, answer in enumerate(stored["answers"]):
        answer["edited_refused"] = number % 2 == 0
    stored["edited"]["loss"]["own_completions"]["value"] += 0.25
    (tmp_path / "report.json").write_text(json.dumps(stored))
    found = printed("compare", out, tmp_path, "--json")
    assert found["unlike"] == []
    assert len(found["measures"]) == len(compare(out, tmp_path).rows)
    loss = found["measures"]["loss.own_completions"]
    assert loss["second"] == stored["edited"]["loss"]["own_completions"]
    assert loss["difference"] == pytest.approx(0.25)
    assert loss["paired"] is None
    refusal = found["measures"]["refusal.target"]
    mine = [answer for answer in stored["answers"] if answer["set"] == "target"]
    assert refusal["paired"]["n"] == len(mine)
    assert refusal["base"] == stored["base"]["refusal"]["target"]


def test_sweep_prints_what_it_stores(model, run, tmp_path):
    words = ("--methods", "ablate", "--scopes", "one,all", "--suite", "refusal,loss", *QUICK)
    found = printed("sweep", model, "--run", run, "--out", tmp_path / "sweep", *words)
    assert found == {"sweep": str(tmp_path / "sweep"), **json.loads((tmp_path / "sweep" / "sweep.json").read_text())}
    assert len(found["variants"]) == 2


def test_verify_prints_its_proof(model, edited):
    found = printed("verify", edited, "--base", model, "--no-record", "--json")
    assert found["verification"]["passed"] is True
    assert found["verification"]["hooks_gap"] < 1e-3
    assert found["recipe"]["tensors"].keys() == {each.name for each in load_recipe(edited).tensors}


def test_demo_prints_what_it_made(model, edited, evaluated, tmp_path, monkeypatch):
    out, document = evaluated
    proof = verify(edited, model, logits=False, record=False).verification
    made = DemoResult(load_recipe(edited), proof, load_report(out), out / "report.html")
    monkeypatch.setattr("orthogonalize.commands.demo.demo", lambda *_, **__: made)  # which takes minutes
    found = printed("demo", "--out", tmp_path / "demo", "--json")
    assert found == {
        **document,
        "report": str(tmp_path / "demo"),
        "edit": found["edit"],
        "verification": proof.model_dump(),
    }
    assert found["edit"].startswith("ablate, all")


def test_what_is_not_a_number_is_null(capsys):
    echo_json({"kl": [float("nan"), float("inf"), 0.1]})
    assert json.loads(capsys.readouterr().out) == {"kl": [None, None, 0.1]}


@pytest.mark.parametrize(
    "command", ["extract", "rank", "eval", "verify", "compare", "sweep", "judge", "demo", "doctor"]
)
def test_every_command_with_tables_has_the_option(command):
    option = next(each for each in main.commands[command].params if "--json" in each.opts)
    assert option.is_flag
