"""`eval`, `sweep` and `verify` refuse weights that do not belong together, or say it before anything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.command_line import UNTRIED, command
from safetensors.torch import load_file, save_file

from orthogonalize import load_recipe, load_report, verify
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.evals.origins import mismatches
from orthogonalize.reports.model_card import card_text
from orthogonalize.selection.run_folder import load_run

RUN_SETTINGS = UNTRIED
QUICK = ("--suite", "refusal", "--engine", "hf", "--max-new-tokens", "4")


@pytest.fixture(scope="module")
def other(model, tmp_path_factory) -> Path:
    """A sibling of the model with the same shapes, as a fine-tuned one is."""
    folder = tmp_path_factory.mktemp("other") / "sibling"
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "norm" not in name)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def another_run(run, other, tmp_path_factory) -> Path:
    """The run, as if it had been extracted from the sibling."""
    from orthogonalize.checkpoints.checkpoint import open_checkpoint

    folder = tmp_path_factory.mktemp("runs") / "another"
    shutil.copytree(run, folder)
    stored = json.loads((folder / "run.json").read_text())
    stored |= {"weights": open_checkpoint(other).fingerprint(), "model": str(other)}
    (folder / "run.json").write_text(json.dumps(stored))
    return folder


def test_what_belongs_together_is_measured_without_a_word(model, run, edited, tmp_path):
    status, said = command("eval", edited, "--base", model, "--run", run, *QUICK, "--out", tmp_path / "report")
    assert status == 0, said
    assert "fair" not in said
    assert "mismatches" not in (tmp_path / "report" / "report.json").read_text()
    assert "Edited from model" in (tmp_path / "report" / "report.html").read_text()


def test_each_mismatch_is_named(model, run, edited, other, another_run):
    info, another = load_run(run).info, load_run(another_run).info
    assert mismatches(model, "m", info, edited) == []
    assert mismatches(model, "m", info) == []
    assert mismatches(other, "sibling", info, edited) == [
        "the base (sibling) is not the base of the recipe (model): its weights differ",
        "the run is of another model (model) than sibling: their weights differ",
    ]
    assert mismatches(model, "m", another, edited) == [
        "the run is of another model (sibling) than m: their weights differ"
    ]
    assert mismatches(model, "m", info, model) == [
        "the checkpoint has the weights of the base (m) itself, so nothing was edited"
    ]


@pytest.mark.parametrize("case", ["base", "run", "itself"])
def test_eval_refuses_or_says_it_first(case, model, run, edited, other, another_run, tmp_path):
    base = other if case == "base" else model
    checkpoint = model if case == "itself" else edited
    words = ["eval", checkpoint, "--base", base, "--run", another_run if case == "run" else run, *QUICK]
    words += ["--out", tmp_path / "report"]
    status, said = command(*words)
    expected = {"base": "is not the base of the recipe", "run": "the run is of another model", "itself": "itself"}[case]
    assert status == 1
    assert expected in said
    assert "--allow-other-base" in said
    assert not (tmp_path / "report").exists()
    status, said = command(*words, "--allow-other-base")
    assert status == 0, said
    first = said.splitlines()[0]
    assert first.startswith("not a fair comparison: ")
    assert expected in first
    report = load_report(tmp_path / "report")
    assert any(expected in each for each in report.mismatches)
    assert str(tmp_path) not in " ".join(report.mismatches)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Not a fair comparison: " in page
    assert "Edited from" not in page
    if case != "itself":
        assert "**Not a fair comparison: " in card_text(load_recipe(edited), {}, report)


def test_a_run_of_another_model_is_said_of_a_checkpoint_without_a_recipe(model, edited, other, another_run, tmp_path):
    """It does not say what it was made from, so only the prompts of the run are used."""
    bare = tmp_path / "bare"
    shutil.copytree(edited, bare, ignore=shutil.ignore_patterns("orthogonalize.json"))
    words = ["--run", another_run, *QUICK, "--out", tmp_path / "report"]
    status, said = command("eval", bare, "--base", model, *words)
    assert status == 0, said
    assert said.startswith("not a fair comparison: the run is of another model")
    assert load_report(tmp_path / "report").mismatches
    assert command("eval", model, "--base", model, *words, "--force")[0] == 1


def test_sweep_refuses_or_says_it_first(model, another_run, tmp_path):
    words = ["sweep", model, "--run", another_run, "--methods", "ablate", "--scopes", "one", *QUICK]
    words += ["--out", tmp_path / "sweep"]
    status, said = command(*words)
    assert status == 1
    assert "the run is of another model (sibling) than model" in said
    status, said = command(*words, "--allow-other-base")
    assert status == 0, said
    assert said.startswith("not a fair comparison: the run is of another model")
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["mismatches"]


def test_verify_compares_with_another_base_only_when_asked(edited, other):
    with pytest.raises(OrthogonalizeError, match=r"not the base of the recipe.*--allow-other-base"):
        verify(edited, other, logits=False, record=False)
    found = verify(edited, other, logits=False, record=False, allow_other_base=True)
    assert found.verification is None
    assert found.leaks == {}
    assert found.changed
    status, said = command("verify", edited, "--base", other, "--no-logits", "--allow-other-base")
    assert status == 0
    assert said.splitlines()[0].startswith("not a fair comparison: ")
    assert load_recipe(edited).verification is None or load_recipe(edited).verification.passed
