"""The programs in `examples/`, on tiny models."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.chat import bake_prompts
from helpers.command_line import SMALL
from helpers.samples import two_sides
from safetensors.torch import save_file

EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS = {name: getattr(SMALL, name) for name in ("train", "val", "test", "filtered", "behaviour_tokens", "max_rank")}


@pytest.fixture
def run_example(monkeypatch, capsys):
    """Runs an example with command-line words; returns what it prints."""

    def run(name: str, *words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_tested():
    named = Path(__file__).read_text("utf-8")
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'"{path.stem}"' not in named] == []


def test_extract_and_edit(run_example, model, sources, tmp_path):
    settings = json.dumps(SETTINGS | {"trials": 2, "behaviour_tokens": None, "measure": "direction"})
    words = ["--positive", sources["positive"], "--negative", sources["negative"], "--settings", settings]
    said = run_example("extract_and_edit", model, *words, "--out", tmp_path / "out")
    assert said.count("% left, other answers moved by") == 2
    assert "hooks = weights: True" in said
    assert (tmp_path / "out" / "edited" / "model.safetensors").is_file()


def test_compare_two_checkpoints(run_example, model, edited):
    said = run_example("compare_two_checkpoints", model, edited)
    assert said.startswith("an orthogonalisation of rank 1: ")
    assert "rank 1\n" in said
    assert "directions that the changes share: [1, 32]" in said


@pytest.mark.parametrize("own", [False, True])
def test_leace_on_your_own_activations(run_example, own, tmp_path):
    words = []
    if own:
        positive, negative = two_sides(n=200)
        save_file({"positive": positive, "negative": negative}, tmp_path / "activations.safetensors")
        words = [tmp_path / "activations.safetensors"]
    said = run_example("leace_on_your_own_activations", *words)
    before, after = (float(line.rpartition(" ")[2].rstrip("%")) for line in said.splitlines()[:2])
    assert before > 75
    assert 35 < after < 65
    assert "rank 1" in said


def test_quickstart_notebook_runs_from_contrast_to_report(model, tmp_path, capsys):
    """Its cells in order, with a tiny model and its prompts in place of those of the first."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", ())] == [0]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    positive, negative = bake_prompts()
    names = {}
    exec("".join(cells[0]["source"]).replace("oz.planted_model()", "None"), names)
    assert len(names["positive"]) == len(names["negative"]) == 24
    # Random weights have no behaviour that first tokens show.
    settings = replace(SMALL, behaviour_tokens=None, measure="direction", finders=("dim",))
    names |= {"model": str(model), "work": tmp_path, "positive": positive, "negative": negative, "settings": settings}
    for cell in cells[1:]:
        exec("".join(cell["source"]), names)
    said = capsys.readouterr().out
    assert "hooks = weights: True" in said
    assert float(said.split("rounding included: ")[1].split()[0]) < 1e-4
    assert (tmp_path / "report" / "report.html").is_file()
