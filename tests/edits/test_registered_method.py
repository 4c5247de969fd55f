"""An edit method and a direction finder registered outside the package, through every command that uses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.command_line import command
from helpers.llama import LAYERS, WIDTH
from safetensors.torch import load_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import AffineMap, removal
from orthogonalize.directions.finders.base import DirectionFinder, Fitted
from orthogonalize.directions.finders.registry import FINDERS
from orthogonalize.edits.build import intervention_from_directions
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.methods.base import EditMethod
from orthogonalize.edits.methods.registry import METHODS
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.reports.sweep import Sweep
from orthogonalize.selection.run_folder import load_run
from orthogonalize.selection.settings import Settings
from orthogonalize.selection.variants import make_variants

FIGURES = True  # of runs, at which a test looks
SMALL = ("--train", "12", "--val", "4", "--test", "6", "--no-filter", "--behaviour-tokens", "sorry", "--max-rank", "3")


class PrincipalComponent(DirectionFinder):
    """The first principal component of both sides' samples together, pointing to the positive side."""

    name = "pca"
    title = "first principal component"
    summary = "direction of largest variance"

    def fit(self, positive, negative, settings) -> Fitted:
        basis = self.first_direction(positive, negative, settings)
        return Fitted({"basis": basis[..., None, :]})

    def first_direction(self, positive, negative, settings) -> torch.Tensor:
        samples = torch.cat([positive, negative]).double()
        samples = (samples - samples.mean(0)).permute(1, 2, 0, 3)  # [positions, layers, prompts, d]
        _, spread, axes = torch.linalg.svd(samples, full_matrices=False)
        varies = spread[..., :1] > 1e-6 * spread.max()  # not so at the first layer of a template's token
        first = torch.where(varies, axes[..., 0, :], 0.0)
        towards = (first * (positive.double().mean(0) - negative.double().mean(0))).sum(-1, keepdim=True)
        return torch.where(towards < 0, -first, first)


class Dampen(EditMethod):
    """Removes a share of the first principal component, by default half."""

    name = "dampen"
    summary = "removes part of a principal component"
    finders = ("pca",)
    options = frozenset({"alpha", "rank"})
    grid = ({"alpha": 0.5}, {"alpha": 1.0, "rank": 1})
    projects = True

    def map(self, choice: EditConfig, basis: torch.Tensor, norm: float) -> AffineMap:
        return removal(basis, choice.strength * choice.alpha / 2)


@pytest.fixture(scope="module", autouse=True)
def registered():
    FINDERS.add(PrincipalComponent())
    METHODS.add(Dampen())
    yield
    METHODS.remove("dampen")
    FINDERS.remove("pca")


@pytest.fixture(scope="module")
def run(model, sources, tmp_path_factory) -> Path:
    """A run of the command line with the registered finder, with global scores and two draws of the prompts."""
    out = tmp_path_factory.mktemp("runs") / "run"
    sides = [word for side in ("positive", "negative") for word in (f"--{side}", sources[side])]
    more = ("--finders", "dim,pca", "--trials", "2", "--seeds", "2", "--scoring", "local,global", "--enough", "0")
    status, said = command("extract", model, "--out", out, *sides, *SMALL, *more)
    assert status == 0, said
    assert "pca" in said
    return out


@pytest.fixture(scope="module")
def edited(model, run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("edited") / "edited"
    status, said = command("edit", model, "--out", out, "--run", run, "--method", "dampen", "--rank", "1")
    assert status == 0, said
    assert said.startswith("dampen, all, direction of layer")
    assert "alpha 2" in said
    return out


def test_registered_finder_is_stored_and_scored(run):
    tensors = load_file(run / "directions.safetensors")
    positions = tensors["mean_diffs"].shape[0]
    assert tensors["pca.basis"].shape == (positions, LAYERS + 1, 1, WIDTH)
    assert tensors["stability.pca"].shape == (2, positions, LAYERS + 1)
    stored = json.loads((run / "candidates.json").read_text())
    mine = [c for c in stored["candidates"] if c["method"] == "pca"]
    places = {(c["layer"], c["position"]) for c in mine}
    assert {(layer, -1) for layer in range(1, LAYERS)} <= places
    assert (0, -1) not in places, "no direction where no prompt differs"
    assert all(c["global_kl"] >= 0 and c["rank_of_basis"] == 1 for c in mine)
    assert set(stored["spearman"]) == {"dim", "pca"}
    assert {p["rank"] for p in stored["probes"] if p["method"] == "pca"} == {1}
    found = load_run(run)
    assert found.info.finders == ["dim", "pca"]
    basis = found.directions.basis("pca", -1, 2)
    assert torch.allclose(basis @ basis.mT, torch.ones(1, 1, dtype=torch.float64))
    assert "pca" in repr(found.directions)


def test_registered_finder_is_drawn(run):
    plots = {file.name: file.stat().st_size for file in (run / "plots").iterdir()}
    assert {"candidates-dim.png", "candidates-pca.png", "cosines.png", "probes.png"} <= plots.keys()
    assert min(plots.values()) > 5000


def test_registered_finder_is_ranked_again(run):
    status, said = command("rank", run, "--kl", "1e9", "--induce", "-1e9", "--prune", "0")
    assert status == 0, said
    assert said.count("pca") == sum(c.finder == "pca" for c in load_run(run).candidates)


def test_edit_by_registered_method_rebuilds_and_verifies(edited, model, run, tmp_path):
    recipe = load_recipe(edited)
    assert (recipe.choice.method, recipe.choice.rank) == ("dampen", 1)
    assert [p.method for p in recipe.probes] == ["dampen"]
    best = next(c for c in load_run(run).candidates if c.finder == "pca")
    assert (recipe.choice.position, recipe.choice.layer) == (best.position, best.layer)
    status, said = command("edit", model, "--out", tmp_path / "again", "--recipe", edited / "orthogonalize.json")
    assert status == 0, said
    for file in open_checkpoint(edited).files:
        assert (tmp_path / "again" / file).read_bytes() == (edited / file).read_bytes()
    status, said = command("verify", edited, "--base", model)
    assert status == 0, said
    assert "NOT" not in said
    card = (edited / "README.md").read_text()
    assert "dampen, all" in card
    assert "Remaining along the direction after rounding" in card


def test_sweep_compares_the_registered_method(model, run, tmp_path):
    words = ("--methods", "ablate,dampen", "--scopes", "one,all", "--engine", "hf", "--suite", "refusal,kl")
    status, said = command("sweep", model, "--run", run, "--out", tmp_path / "out", *words, "--max-new-tokens", "4")
    assert status == 0, said
    names = [f"{name} {scope}" for name in ("ablate", "dampen 0.5", "dampen 1 1") for scope in ("one", "all")]
    found = Sweep.model_validate_json((tmp_path / "out" / "sweep.json").read_text())
    assert sorted(v.name for v in found.variants) == sorted(names)
    assert {v.direction for v in found.variants if v.choice.method == "dampen"} == {"pca"}
    assert all(name in said for name in names)
    assert any(v.choice.method == "dampen" for v in make_variants(load_run(run)))


@pytest.mark.parametrize(("words", "wanted"), [
    (("extract",), "pca (direction of largest variance)"),
    (("edit",), "dampen]"),
    (("sweep",), "dampen."),
], ids=lambda value: value[0] if isinstance(value, tuple) else "")  # fmt: skip
def test_help_lists_registered_names(words, wanted):
    status, said = command(*words, "--help")
    assert status == 0
    assert wanted in " ".join(said.split())


def test_registered_finder_must_be_asked_for():
    """It does not become part of runs whose command does not name it."""
    assert "pca" not in Settings().finders
    assert "[default: dim,inlp,leace]" in " ".join(command("extract", "--help")[1].split())


def test_rank_by_accuracy_needs_a_finder_with_classifiers(run):
    choice = EditConfig(method="dampen", position=-1, layer=2, rank="acc99")
    with pytest.raises(OrthogonalizeError, match="--rank acc99 needs INLP's accuracies, which pca does not have"):
        intervention_from_directions(choice, load_run(run).directions)


def test_recipe_of_an_unregistered_method_says_so(edited):
    METHODS.remove("dampen")
    try:
        with pytest.raises(OrthogonalizeError, match="unknown edit method 'dampen'; available: ablate, "):
            load_recipe(edited)
    finally:
        METHODS.add(Dampen())
