"""The edits that a run lists: in the terminal, in candidates.json and in a figure, and made by `edit --pick`."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.command_line import SMALL, UNTRIED, command
from helpers.llama import LAYERS, WIDTH
from safetensors.torch import save_file

from orthogonalize.cli import main
from orthogonalize.commands import _console
from orthogonalize.commands import extract as extraction
from orthogonalize.commands.edit import edit
from orthogonalize.commands.extract import extract
from orthogonalize.data.refusals import LEAST_TOKENS
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.fitting.fit import ANSWER_START
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.evals.measures.check import AnswerCheck
from orthogonalize.reports.run_plots import plot_run, trial_figure
from orthogonalize.selection.own_answers import ANSWER_TOKENS
from orthogonalize.selection.readers import base as reading
from orthogonalize.selection.resolve import choose
from orthogonalize.selection.run_folder import Run, load_run, save_selection
from orthogonalize.selection.search.objectives import Trial

OUTCOMES = [(0.0, 0.20), (0.30, 0.15), (0.05, 0.10), (0.06, 0.12), (0.40, 0.0123)]  # (left, KL); 1 and 3 are beaten


@pytest.fixture(scope="module")
def run_settings():
    return dataclasses.replace(UNTRIED, finders=("dim",))


@pytest.fixture
def tried(run, tmp_path) -> Path:
    """A run with tried edits of different strengths, of which the first, third and fifth are listed."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    found = load_run(folder)
    trials = [
        Trial(
            choice=EditConfig(method="ablate", scope="layers:1-2", position=-1, layer=2, strength=0.5 + 0.1 * i),
            left=left, before=0.95, score=-3.0, kl=kl, first_kl=kl / 2, ce_increase=-0.031, preserved={"other": 0.7},
            flipped={"other": 0.03},
            kls={"": [kl]}, confirmed=None if i else 0.021,
            degenerate=None if i else 0.25, degenerate_before=None if i else 0.125,
        )
        for i, (left, kl) in enumerate(OUTCOMES)
    ]  # fmt: skip
    save_selection(found.candidates, trials, found.probes, folder)
    return folder


def strengths(trials) -> list[float]:
    return [round(t.choice.strength, 1) for t in trials]


def test_run_folder_holds_the_list_without_the_kls_of_single_prompts(tried):
    stored = json.loads((tried / "candidates.json").read_text())
    assert stored["shortlist"] == [0, 2, 4]
    assert all("kls" not in row and "harm" not in row for row in stored["trials"])
    run = load_run(tried)
    assert len(run.trials) == 5
    assert strengths(run.shortlist) == [0.5, 0.7, 0.9]


@pytest.mark.parametrize(("pick", "strength"), [((), 0.5), (("--pick", "1"), 0.5), (("--pick", "3"), 0.9)])
def test_edit_makes_the_edit_of_that_number(tried, model, tmp_path, pick, strength):
    status, said = command("edit", model, "--run", tried, *pick, "--out", tmp_path / "edited")
    assert status == 0, said
    assert load_recipe(tmp_path / "edited").choice.strength == pytest.approx(strength)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--pick", "4"), "there is no edit 4: the run has 3 edits to pick from"),
        (
            ("--pick", "2", "--scope", "all", "--per-layer"),
            "--pick determines the whole edit; omit --scope, --per-layer",
        ),
        (("--pick", "2", "--method", "ablate"), "--pick determines the whole edit; omit --method"),
    ],
)
def test_unusable_pick_is_one_line(tried, model, tmp_path, words, complaint):
    status, said = command("edit", model, "--run", tried, *words, "--out", tmp_path / "edited")
    assert (status, said) == (1, f"error: {complaint}")
    assert not (tmp_path / "edited").exists()


def test_pick_needs_a_run_that_tried_edits(run, model, tmp_path):
    status, said = command("edit", model, "--run", run, "--pick", "1", "--out", tmp_path / "edited")
    assert (status, said) == (1, "error: there is no edit 1: the run tried no edits (extract --trials)")
    direction = tmp_path / "direction.pt"
    direction.touch()
    status, said = command("edit", model, "--direction", direction, "--pick", "1", "--out", tmp_path / "edited")
    assert (status, said) == (1, "error: --pick chooses among the edits that a run tried; give --run")


def test_terminal_lists_the_edits_with_their_numbers(tried, monkeypatch):
    with _console.console.capture() as printed:
        _console.show_run(load_run(tried))
    lines = printed.get().splitlines()
    rows = [line.split("│") for line in lines if "ablate" in line or "unedited" in line]
    unedited, *cells = [[cell.strip() for cell in row[1:-1]] for row in rows]
    assert unedited[2:] == ["95.0%", "", "12.5%", "0.0000", "0.0000", "0.0000", "0.0%", "+0.0%"]
    assert [row[0] for row in cells] == ["1", "2", "3"]
    assert "strength 0.7" in cells[1][1]
    assert cells[0][2:] == ["0.0%", "2.1%", "25.0%", "0.2000", "0.1000", "0.7000", "3.0%", "-3.1%"]
    assert cells[2][2:] == ["40.0%", "", "", "0.0123", "0.0062", "0.7000", "3.0%", "-3.1%"]
    assert "edit --pick N" in printed.get()


def test_figure_marks_and_numbers_the_listed_edits(tried):
    found = load_run(tried)
    (axis,) = trial_figure(found).axes
    others, listed, unedited = (collection.get_offsets().tolist() for collection in axis.collections)
    assert unedited == [[95.0, 0.0]]
    assert listed == [[0.0, 0.2], [5.0, 0.1], [40.0, 0.0123]]
    assert others == [[30.0, 0.15], [6.0, 0.12]]
    assert [(text.get_text(), list(text.xy)) for text in axis.texts] == [
        (str(n), place) for n, place in enumerate(listed, 1)
    ]
    plot_run(found, tried)
    assert (tried / "plots" / "trials.png").stat().st_size > 5000
    assert trial_figure(Run(found.info, [], found.directions, found.candidates, [])) is None


class AllRefuse(AnswerCheck):
    @classmethod
    def of(cls, info, device="auto"):
        return cls(lambda pairs, journal: [True] * len(pairs))


def test_edits_are_confirmed_by_answers_as_long_as_refusals_need(model, sources, tmp_path, monkeypatch):
    """With fewer than 100 tokens refusals are undercounted, for the base as well as for the edits."""
    lengths, real = [], reading.generate

    def noting(model, ids, tokens, stops, **others):
        lengths.append(tokens)
        return real(model, ids, min(tokens, 3), stops, **others)

    monkeypatch.setattr(reading, "generate", noting)
    monkeypatch.setattr(extraction, "AnswerCheck", AllRefuse)
    settings = dataclasses.replace(SMALL, trials=2, finders=("dim",))
    found = extract(str(model), tmp_path / "run", **sources, settings=settings)
    own, confirming, others = lengths[:4], lengths[4:7], lengths[7:]
    fitted = [ANSWER_START, ANSWER_TOKENS, ANSWER_START]
    assert own == [*fitted, ANSWER_TOKENS], "to fit to, on both sides and of spare prompts, and to measure along"
    assert len(confirming) == 3, "the base's answers, and those of both edits"
    assert len(others) == 2, "the wording of both sides, since no edit is chosen"
    assert min(confirming + others) >= max(LEAST_TOKENS, 100)
    assert [t.confirmed for t in found.trials] == [1.0, 1.0]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The notes that `edit` prints."""
    notes: list[str] = []
    monkeypatch.setattr("orthogonalize.commands.edit.note", notes.append)
    return notes


def best(tried) -> str:
    first = next(c for c in load_run(tried).candidates if c.finder == "dim")
    return f"the run's best dim direction: position {first.position}, layer {first.layer}"


@pytest.mark.parametrize(
    ("settings", "scope", "strength"),
    [
        ({"method": "ablate"}, "all", 1.0),
        ({"method": "actadd"}, "one", 1.0),
        ({"strength": 0.7}, "all", 0.7),
        ({"scope": "upto:2"}, "upto:2", 1.0),
    ],
)
def test_any_option_makes_a_new_edit_with_the_defaults(tried, settings, scope, strength):
    """The run's tried edits have another scope and other strengths; none of them leaks into a new edit."""
    chosen = choose(load_run(tried), **settings)
    assert (chosen.scope, chosen.strength) == (scope, strength)


def test_edit_prints_what_it_took_from_where(tried, model, tmp_path, said):
    def notes(**settings) -> str:
        said.clear()
        edit(str(model), tmp_path / str(len(list(tmp_path.iterdir()))), run=tried, **settings)
        return next(line for line in said if line.startswith("taken from "))

    assert notes() == "taken from everything: the best edit that extract tried"
    assert notes(pick=3) == "taken from everything: edit 3 of those that extract lists"
    listed = "(--pick 1 is the best ablate that extract lists)"
    assert notes(method="ablate") == (
        f"taken from options: method ablate; {best(tried)}; defaults: scope all, strength 1 {listed}"
    )
    assert notes(strength=0.5, layer=2, position=-1) == (
        f"taken from options: strength 0.5, position -1, layer 2; defaults: method ablate, scope all {listed}"
    )
    assert notes(method="actadd", coefficient=2.0) == (
        f"taken from options: method actadd, coefficient 2; {best(tried)}; defaults: scope one, strength 1"
    )


def test_edit_of_a_file_or_recipe_says_so(model, tried, tmp_path, said):
    save_file({"direction": torch.ones(WIDTH)}, tmp_path / "found.safetensors")
    edit(str(model), tmp_path / "a", direction=tmp_path / "found.safetensors", layer=2, method="ablate")
    assert "taken from options: method ablate, layer 2; defaults: scope all, strength 1" in said
    edit(str(model), tmp_path / "b", recipe=tmp_path / "a")
    assert said[-1] == "taken from everything: the recipe"


def test_help_states_the_rule_and_the_defaults():
    text = " ".join(CliRunner().invoke(main, ["edit", "--help"]).output.split())
    assert "Any other option, --method included, makes a new edit" in text
    for words in ("Edit method; default: ablate.", "all (default; one for actadd)", "Scale of the edit, default 1"):
        assert words in text


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--layer", "99"), f"the run has no layer 99; its layers are 0 to {LAYERS}"),
        (("--position", "-9"), "the run has no position -9; it has -3 to -1"),
    ],
)
def test_place_that_the_run_did_not_read_is_named(tried, model, tmp_path, words, complaint):
    status, said = command("edit", model, "--run", tried, *words, "--out", tmp_path / "edited")
    assert (status, said) == (1, f"error: {complaint}")


def test_one_edited_tensor_is_singular(tried, model, tmp_path):
    words = ("--method", "ablate", "--scope", "upto:0", "--out", tmp_path / "edited")
    status, said = command("edit", model, "--run", tried, *words)
    assert status == 0, said
    assert "1 tensor edited, 1 added" in said


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_adapter_has_the_permissions_that_the_umask_gives(tried, model, tmp_path, mask):
    before = os.umask(mask)
    try:
        words = ("--method", "ablate", "--scope", "layers:1-2", "--format", "lora", "--out", tmp_path / "adapter")
        status, said = command("edit", model, "--run", tried, *words)
    finally:
        os.umask(before)
    assert status == 0, said
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "adapter").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


@pytest.mark.parametrize("option", ["--kl", "--induce"])
def test_rank_refuses_a_filter_that_is_no_number(tried, option):
    status, said = command("rank", tried, option, "nan")
    assert status == 1
    assert "finite" in said or "number" in said
