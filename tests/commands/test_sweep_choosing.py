"""A sweep reports its measures of test prompts, and chooses its best trade-offs on val prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.command_line import UNTRIED, command

from orthogonalize.engines.transformers import TransformersEngine
from orthogonalize.evals.choosing import choosing_suites
from orthogonalize.reports.sweep import MARK, Sweep, pareto
from orthogonalize.selection.run_folder import load_run

RUN_SETTINGS = UNTRIED
QUICK = ("--engine", "hf", "--max-new-tokens", "6")
TWO = ("--methods", "ablate", "--scopes", "one,all")


def swept(model, run, out, *words) -> tuple[Sweep, str]:
    status, said = command("sweep", model, "--run", run, "--out", out, *QUICK, *words)
    assert status == 0, said
    return Sweep.model_validate_json((out / "sweep.json").read_text()), said


def with_prompts(run: Path, out: Path, change) -> Path:
    """A copy of a run whose prompts.jsonl has the rows that `change` makes of each (None leaves it out)."""
    shutil.copytree(run, out)
    rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    kept = [row for row in map(change, rows) if row is not None]
    (out / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in kept) + "\n")
    return out


@pytest.fixture(scope="module")
def shown(run, tmp_path_factory) -> Path:
    """A copy of the run whose behaviour the model shows on all positive val prompts but one."""
    out = tmp_path_factory.mktemp("shown") / "run"
    shutil.copytree(run, out)
    info = json.loads((out / "run.json").read_text())
    scores = sorted(p.score for p in load_run(run).prompts if (p.side, p.split) == ("positive", "val"))
    info["measure"]["threshold"] = (scores[0] + scores[1]) / 2
    (out / "run.json").write_text(json.dumps(info))
    return out


@pytest.fixture(scope="module")
def found(model, shown, tmp_path_factory) -> tuple[Sweep, str, int]:
    """A sweep, its table, and the number of engines that it started."""
    starts: list[int] = []
    enter = TransformersEngine.__enter__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "__enter__", lambda self: starts.append(1) or enter(self))
        return *swept(model, shown, tmp_path_factory.mktemp("out") / "sweep", *TWO), len(starts)


def test_val_prompts_are_answered_by_the_same_engine(found, run):
    result, _, starts = found
    assert starts == 1
    prompts = load_run(run).prompts
    counts = {split: sum((p.split, p.side) == (split, "positive") for p in prompts) for split in ("test", "val")}
    assert counts["test"] != counts["val"]
    assert result.base.refusal.target.n == counts["test"]
    assert result.val.refusal.target.n == counts["val"]
    for row in result.variants:
        assert row.paired["behaviour.target"].n == counts["test"]
        assert row.val["behaviour.target"].n == counts["val"]
        others = {"kl.first_token", "kl.completions", "loss.other_prompts"}
        others |= {key for key in result.base.flat() if key.startswith("suites.form.")}
        assert row.val.keys() == result.val.flat().keys() == set(result.base.flat()) - others


def test_val_comparison_is_that_of_the_val_prompts(found, model, shown, tmp_path):
    """As a sweep reports them where the val prompts are the test prompts."""

    def swapped(row):
        return row | {"split": {"val": "test", "test": "val"}.get(row["split"], row["split"])}

    other, _ = swept(model, with_prompts(shown, tmp_path / "run", swapped), tmp_path / "out", *TWO)
    for mine, theirs in zip(found[0].variants, other.variants, strict=True):
        assert mine.val == {key: theirs.paired[key] for key in mine.val}
        assert theirs.val == {key: mine.paired[key] for key in theirs.val}


def test_table_and_file_say_what_chose(found):
    result, said, _ = found
    assert result.pareto
    assert result.pareto == pareto(result)
    assert result.unmarked is None
    assert said.count(MARK) == len(result.pareto)
    assert "measured on test prompts; best trade-offs are chosen on val prompts" in " ".join(said.split())


def test_an_edit_that_removes_nothing_is_no_trade_off(found):
    """The base is a rival: `ablate one`, 95% to 100%, was marked."""
    result = found[0].model_copy(deep=True)
    for row, difference in zip(result.variants, (0.05, 0.0), strict=True):
        row.val["behaviour.target"].difference = difference
    assert pareto(result) == []
    result.variants[0].val["behaviour.target"].difference = -0.1
    assert pareto(result) == [result.variants[0].name]


@pytest.mark.parametrize(("suites", "reason"), [
    ("refusal,pile", "no harm is measured on val prompts (--suite has neither loss nor kl)"),
    ("loss,kl", "no effect is measured on val prompts (--suite has neither refusal nor behaviour)"),
])  # fmt: skip
def test_nothing_is_marked_without_a_measure(suites, reason, model, run, data, tmp_path):
    words = ("--methods", "ablate", "--scopes", "one", "--suite", suites, "--data", data, "--limit", "2")
    result, said = swept(model, run, tmp_path / "out", *words)
    assert (result.pareto, result.val, result.unmarked) == ([], None, reason)
    assert all(row.val == {} and row.paired for row in result.variants)
    assert f"no best trade-off is marked: {reason}" in " ".join(said.split())
    assert MARK not in said


def test_nothing_is_marked_without_val_prompts(model, run, tmp_path):
    bare = with_prompts(run, tmp_path / "run", lambda r: None if (r["split"], r["side"]) == ("val", "negative") else r)
    result, said = swept(model, bare, tmp_path / "out", "--methods", "ablate", "--scopes", "one")
    assert result.unmarked == "the run has no val prompts on the negative side"
    assert result.unmarked in " ".join(said.split())
    assert result.pareto == []


def test_only_what_chooses_is_measured_on_val_prompts():
    assert choosing_suites(["mmlu", "kl", "loss", "behaviour", "refusal"]) == ["refusal", "behaviour", "loss"]
    assert choosing_suites(["kl", "refusal", "xstest"]) == ["refusal", "kl"]


def test_engine_has_room_for_the_longest_val_prompt(model, run, tmp_path, monkeypatch):
    def lengthened(row):
        return (
            row | {"text": "how do i bake a cake " * 6} if (row["split"], row["side"]) == ("val", "positive") else row
        )

    asked: list[int] = []

    def opened(name, folder, tokenizer, context, options):
        asked.append(context)
        raise OSError(1, "no engine")

    monkeypatch.setattr("orthogonalize.evals.setup.open_engine", opened)
    for source, name in ((run, "short"), (with_prompts(run, tmp_path / "run", lengthened), "long")):
        command("sweep", model, "--run", source, "--out", tmp_path / name, *QUICK, *TWO, "--suite", "refusal,loss")
    short, long = asked
    assert long > short + 20
