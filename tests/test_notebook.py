"""What the command line does, from Python: lists of strings, `Path | str`, and what a run holds."""

from __future__ import annotations

import inspect
import sys
import typing
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from helpers import made_up
from helpers.chat import bake_prompts
from helpers.command_line import UNTRIED
from helpers.llama import LAYERS, WIDTH

import orthogonalize as oz
from orthogonalize.core.errors import OrthogonalizeError

FIGURES = True  # of runs, at which a test looks
RUN_SETTINGS = UNTRIED


def test_full_pipeline_from_lists_of_strings_without_matplotlib(model, tmp_path, monkeypatch):
    for package in ("matplotlib", "peft"):  # of extras; nothing here needs them
        monkeypatch.setitem(sys.modules, package, None)
    positive, negative = (list(side) for side in bake_prompts())
    run = oz.extract(model, tmp_path / "run", positive=positive, negative=negative, settings=UNTRIED)
    assert set(run.texts("positive", "train")) <= set(positive)
    edited = str(tmp_path / "edited")
    oz.edit(model, edited, run=tmp_path / "run", method="ablate")
    assert oz.verify(edited, model).verification.passed
    report = oz.evaluate(edited, model, str(tmp_path / "run"), tmp_path / "report", engine="hf", suites=["refusal"],
                         max_new_tokens=4)  # fmt: skip
    assert report.paired
    again = oz.extract(str(model), str(tmp_path / "run"), positive=positive, negative=negative, settings=UNTRIED)
    assert again.info == run.info
    assert not (tmp_path / "run" / "plots").exists()
    with pytest.raises(OrthogonalizeError, match="needs matplotlib"):
        oz.plot(tmp_path / "report", tmp_path / "rates.pdf")


@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("extract", ("model", "out", "data")),
        ("edit", ("model", "out", "run", "direction", "recipe")),
        ("evaluate", ("checkpoint", "base", "run", "out", "data")),
        ("sweep", ("model", "run", "out", "data")),
        ("verify", ("checkpoint", "base")),
        ("push", ("checkpoint",)),
        ("compare", ("first", "second")),
        ("judge", ("file",)),
        ("describe", ("model",)),
        ("load_run", ("folder",)),
        ("load_report", ("folder",)),
        ("load_recipe", ("path",)),
        ("load_direction", ("file",)),
        ("intervention_of", ("model", "run")),
    ],
)
def test_every_path_may_be_a_path_or_a_string(function, names):
    hints = typing.get_type_hints(getattr(oz, function))
    assert set(names) <= set(inspect.signature(getattr(oz, function)).parameters)
    for name in names:
        assert {Path, str} <= set(typing.get_args(hints[name])), (function, name)


def test_activations_are_found_by_layer_and_position(run):
    found = oz.load_run(str(run))
    means = []
    for side in ("positive", "negative"):
        rows = found.activations(side, "train", position=-2, layer=1)
        assert rows.shape == (len(found.texts(side, "train")), WIDTH)
        means.append(rows.double().mean(0))
    assert torch.allclose(means[0] - means[1], found.directions.mean_diff(-2, 1).double(), atol=1e-5)
    for place, message in (((-9, 1), "no position -9"), ((-1, LAYERS + 1), "no activations of positive.train at")):
        with pytest.raises(OrthogonalizeError, match=message):
            found.activations("positive", "train", *place)


def test_intervention_of_a_run_is_the_one_that_edit_writes(model, run, tmp_path):
    config = oz.EditConfig(method="ablate", scope="upto:2", position=-1, layer=2)
    found = oz.intervention_of(model, run, config)
    recipe = oz.edit(
        model, tmp_path / "edited", run=run, **config.model_dump(include={"method", "scope", "position", "layer"})
    )
    written = recipe.intervention()
    assert found.writes.keys() == written.writes.keys()
    assert all(found.writes[site].u.equal(written.writes[site].u) for site in found.writes)
    assert oz.intervention_of(model, run).width == WIDTH


def test_figures_of_a_run_can_be_shown(run):
    before = plt.get_fignums()
    figures = oz.run_figures(oz.load_run(run))
    assert set(figures) == {file.stem for file in (run / "plots").glob("*.png")}
    assert all(figure.axes for figure in figures.values())
    assert plt.get_fignums() == before


def test_frames_hold_the_numbers_of_runs_reports_and_sweeps(run):
    found = oz.load_run(run)
    scores = oz.frame(found, "candidates")
    assert list(scores["bypass"]) == [each.bypass for each in found.candidates]
    assert list(oz.frame(found, "prompts")["text"]) == [each.text for each in found.prompts]
    assert oz.frame(found).empty, "this run tried no edits"
    measured = oz.frame(made_up.report()).set_index("key").loc["behaviour.target"]
    assert tuple(measured[["base", "edited", "base_low", "edited_high"]]) == (0.9, 0.1, 0.8, 0.2)
    edits = oz.frame(made_up.sweep({"mild": (0.5, 0.01), "worse": (0.4, 0.3)})).set_index("edit")
    assert list(edits.loc["mild", ["removed", "harm", "pareto"]]) == [0.5, 0.01, True]
    assert edits.loc["not this", "refused"] == "why"
    with pytest.raises(OrthogonalizeError, match="no table 'nowhere'; there are trials, candidates"):
        oz.frame(found, "nowhere")


def test_best_is_the_first_trial_or_says_why_there_is_none(run):
    found = oz.load_run(run)
    with pytest.raises(OrthogonalizeError, match="tried no edits"):
        _ = found.best
    trial = oz.Trial(choice=oz.EditConfig(method="ablate"), left=0.0, score=0.0, kl=0.0, first_kl=0.0, ce_increase=0.0)
    tried = replace(found, trials=[trial])
    assert tried.best is trial
    unchosen = replace(tried, info=found.info.model_copy(update={"nothing_chosen": "the base is as it should be"}))
    with pytest.raises(OrthogonalizeError, match="no edit was chosen: the base is as it should be"):
        _ = unchosen.best
