"""Where the model does not show the behaviour, or no edit removes it, extract chooses nothing, and edit says so."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.command_line import SMALL, command

from orthogonalize.commands import _console
from orthogonalize.commands.extract import extract
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.selection.run_folder import load_run
from orthogonalize.selection.search.objectives import Trial, why_none

CHOICE = EditConfig(method="ablate", scope="all", position=-1, layer=2)


def trial(**values) -> Trial:
    known = {"left": 0.02, "before": 0.9, "usual": 0.0, "score": 0.0, "kl": 0.1, "first_kl": 0.1, "ce_increase": 0.0}
    return Trial(choice=CHOICE, **known | values)


@pytest.mark.parametrize(
    ("best", "reason"),
    [
        (trial(), None),
        (trial(left=0.4, confirmed=0.2), None),
        (
            trial(before=0.01, left=0.0),
            "1.0% of the target val prompts are left to change, and up to 1.0% counts as done",
        ),
        (trial(before=0.3, usual=0.4, left=0.0), "30.0% of the target val prompts are left to change, and up to 40.0%"),
        (trial(left=0.5), "brings 90.0% of the target val prompts only to 50.0%"),
        (trial(before=0.95, left=1.0), "brings 95.0% of the target val prompts only to 100.0%"),
        (trial(confirmed=0.7), "70% of the best edit's answers are not as they should be"),
    ],
)
def test_an_edit_is_chosen_only_if_it_removes_what_the_base_shows(best, reason):
    found = why_none([best, trial(left=0.0)])
    assert found is None if reason is None else reason in found


def test_without_trials_there_is_nothing_to_say():
    assert why_none([]) is None


@pytest.fixture(scope="module")
def unshown(model, sources, tmp_path_factory):
    """A run by a token that no answer begins with; the weakest edit would have been announced as the best."""
    out = tmp_path_factory.mktemp("unshown") / "run"
    extract(str(model), out, **sources, settings=dataclasses.replace(SMALL, trials=2, finders=("dim",)))
    return out


def test_the_run_says_why_and_which_measure_would_tell(unshown):
    found = load_run(unshown)
    assert found.trials
    assert "in the unedited model, 0.0% of the target val prompts" in found.info.nothing_chosen
    assert "first tokens that are learnt (no --behaviour-tokens) would tell the two" in found.info.nothing_chosen
    with _console.console.capture() as printed:
        _console.show_run(found)
    assert "edit --pick N (none was chosen)" in printed.get()


def test_edit_refuses_with_the_way_out(unshown, model, tmp_path):
    status, said = command("edit", model, "--run", unshown, "--out", tmp_path / "edited")
    assert status == 1
    assert said.startswith("error: extract chose no edit: in the unedited model, 0.0% of the target")
    assert said.endswith("choose one with --pick N or --method NAME, or extract again")
    assert not (tmp_path / "edited").exists()


@pytest.mark.parametrize("words", [("--pick", "1"), ("--method", "ablate")])
def test_an_edit_that_is_named_is_made(unshown, model, tmp_path, words):
    status, said = command("edit", model, "--run", unshown, *words, "--out", tmp_path / "edited")
    assert status == 0, said
    assert load_recipe(tmp_path / "edited").choice


def test_a_measure_that_tells_chooses(model, sources, tmp_path):
    settings = dataclasses.replace(SMALL, trials=3, finders=("dim",), behaviour_tokens=None, measure="direction")
    found = extract(str(model), tmp_path / "run", **sources, settings=settings)
    best = found.trials[0]
    assert best.before > 0.7 > 2 * best.usual
    assert (found.info.nothing_chosen is None) == (best.left <= (best.before + best.usual) / 2)


def test_a_judge_is_a_measure(model, sources, tmp_path):
    given = ["extract", model, "--positive", sources["positive"], "--negative", sources["negative"]]
    given += ["--out", tmp_path / "run"]
    status, said = command(*given, "--judge", "nobody")
    assert (status, said) == command(*given, "--measure", "judge:nobody")
    assert status == 1
    assert "nobody" in said
    status, said = command(*given, "--judge", "wildguard", "--measure", "wording")
    assert (status, said) == (1, "error: --judge NAME is short for --measure judge:NAME; give one of them")
