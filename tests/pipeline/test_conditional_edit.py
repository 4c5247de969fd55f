"""Conditional edits from extract to a checkpoint, on a tiny model: fitted, baked, stored, rebuilt and verified."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.command_line import SMALL, command
from helpers.llama import load, logits
from safetensors.torch import load_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.commands.extract import extract
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.fitting.fit import FitTokens
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.models.hooks import intervened
from orthogonalize.selection.fits import Fits
from orthogonalize.selection.run_folder import load_run

OWN = {"method": "conditional", "scope": "all"}
METHOD = [word for name, value in OWN.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def fitted(run, model, tmp_path_factory) -> Path:
    """The model with a conditional edit, as `edit` writes it."""
    out = tmp_path_factory.mktemp("conditional") / "edited"
    status, said = command("edit", model, "--run", run, *METHOD, "--out", out)
    assert status == 0, said
    return out


def test_hooks_of_the_recipe_give_the_logits_of_the_checkpoint(fitted, model):
    intervention = load_recipe(fitted).intervention()
    assert intervention.conditional
    assert not intervention.writes
    base, edited = load(model), load(fitted)
    plain = logits(base)
    with intervened(base, intervention):
        hooked = logits(base)
    assert (hooked - plain).abs().max() > 1e-3, "the edit did nothing"
    assert (hooked - logits(edited)).abs().max() <= 0.02 * (hooked - plain).abs().max()


def test_verify_passes_and_finds_a_tampered_map(fitted, model, tmp_path):
    assert verify(fitted).verification.passed
    recipe = load_recipe(fitted)
    assert all(t.leak is None or t.leak <= 1e-2 for t in recipe.tensors), max(t.leak or 0 for t in recipe.tensors)
    recipe.conditional = recipe.conditional[1:]
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    edit(str(model), tmp_path / "without", recipe=tmp_path / "recipe.json")
    name = "model.layers.0.self_attn.o_proj.weight"
    changed = {n for n in open_checkpoint(fitted).tensors
               if not open_checkpoint(fitted).read(n).equal(open_checkpoint(tmp_path / "without").read(n))}  # fmt: skip
    assert changed == {name}


def test_the_recipe_rebuilds_the_same_bytes(fitted, model, tmp_path):
    edit(str(model), tmp_path / "again", recipe=fitted)
    for file in fitted.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_only_write_matrices_change(fitted, model):
    base, edited = open_checkpoint(model), open_checkpoint(fitted)
    changed = {name for name in base.tensors if not base.read(name).equal(edited.read(name))}
    assert changed
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)


def test_an_adapter_holds_the_edit_at_its_own_rank(run, model, fitted, tmp_path):
    edit(str(model), tmp_path / "adapter", run=run, **OWN, format="lora")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    conditional = load_recipe(fitted).intervention().conditional
    assert len(tensors) == 2 * len(conditional)
    for matrix, each in conditional.items():
        stem = f"base_model.model.model.layers.{matrix.site.layer}.{matrix.name}"
        a, b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
        assert a.shape[0] == 1
        assert torch.allclose((b @ a).double(), -(each.r.mT @ each.c), atol=1e-6)


def test_the_second_time_nothing_is_fitted(run, model, fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "orthogonalize.selection.readers.open_fits.load_model", lambda *_: pytest.fail("the model was loaded")
    )
    edit(str(model), tmp_path / "again", run=run, **OWN)
    with pytest.raises(pytest.fail.Exception, match="was loaded"):
        edit(str(model), tmp_path / "other", run=run, **OWN, target_weight=0.2)


def test_what_is_below_a_fit_is_read_once(run, model, tmp_path):
    found, source, loaded = load_run(run), open_checkpoint(model), load(model)

    def fits(name: str) -> Fits:
        folder = shutil.copytree(run, tmp_path / name)
        shutil.rmtree(folder / "fits", ignore_errors=True)
        return Fits(folder, found.directions, source.config, found.info.weights, lambda: loaded)

    def fit(fits: Fits, first: int, weight: float):
        choice = EditConfig(
            method="conditional", scope=f"from:{first}", position=-1, per_layer=True, target_weight=weight
        )
        return fits.intervention(choice).conditional

    shared = fits("shared")
    fit(shared, 1, 0.3), fit(shared, 3, 0.3)
    below: list[int] = []
    for layer in range(3):
        loaded.model.layers[layer].mlp.register_forward_hook(lambda *_, at=layer: below.append(at))
    again = fit(shared, 3, 0.9)
    assert below == []
    between = fit(shared, 2, 0.9)
    assert set(below) == {1, 2}
    for name, maps, first in (("one", again, 3), ("two", between, 2)):
        fresh = fit(fits(name), first, 0.9)
        assert all(torch.allclose(fresh[matrix].c, each.c, atol=1e-9) for matrix, each in maps.items())


def test_strength_scales_the_fitted_maps(run, model, fitted, tmp_path):
    edit(str(model), tmp_path / "half", run=run, **OWN, strength=0.5)
    whole, half = (load_recipe(f).intervention().conditional for f in (fitted, tmp_path / "half"))
    assert all(torch.allclose(0.5 * whole[matrix].c, half[matrix].c) for matrix in whole)


def test_a_run_without_answers_says_how_to_get_them(model, sources, tmp_path):
    extract(str(model), tmp_path / "run", **sources, settings=SMALL, trials=0)
    with pytest.raises(OrthogonalizeError, match="lacks the model's own answers"):
        edit(str(model), tmp_path / "out", run=tmp_path / "run", method="conditional")
    status, said = command("edit", model, "--run", tmp_path / "run", "--method", "ablate", "--ridge", "0.1",
                           "--out", tmp_path / "out")  # fmt: skip
    assert status == 1
    assert said == "error: --ridge belongs to conditional, not to ablate"


def test_preserved_prompts_enter_the_fit(model, sources, tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("\n".join(f"please count to {n}" for n in range(40)))
    found = extract(str(model), tmp_path / "run", **sources, settings=SMALL, preserve=[str(kept)])
    assert found is not None
    assert {p.split for p in found.preserved} == {"train", "val", "test"}
    tokens = FitTokens.load(tmp_path / "run" / "tokens.json")
    assert set(tokens.preserved) == {str(kept)}
    train = [p for p in found.preserved if p.split == "train"]
    assert len(tokens.preserved[str(kept)].ids) == len(train)
    maps = []
    for weight in (0.0, 100.0):
        out = tmp_path / f"kept{weight:g}"
        edit(str(model), out, run=tmp_path / "run", **OWN, preserve_weight=weight)
        maps.append(load_recipe(out).intervention().conditional)
    assert all(maps[1][m].c.norm() < maps[0][m].c.norm() for m in maps[0])
