"""`ablate --to harmless-mean`: the edited stream has the harmless mean's component along the direction."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.command_line import UNTRIED, command
from helpers.exactness import EXACT, LAYERS, WIDTH, Base, compare
from helpers.expectations import ACTADD, EMBEDDING_REFUSED
from helpers.tiny_models import load_tiny, logits
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import Intervention, Site
from orthogonalize.directions.direction_set import Directions
from orthogonalize.edits.bake import bake
from orthogonalize.edits.build import intervention_from_basis, intervention_from_directions
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.methods.registry import METHODS
from orthogonalize.edits.recipe import Base as RecipeBase
from orthogonalize.edits.recipe import Recipe, Source, load_recipe, store_maps
from orthogonalize.models.forward.block_inputs import capturing_inputs
from orthogonalize.models.hooks import intervened
from orthogonalize.selection.run_folder import load_run

pytestmark = pytest.mark.usefixtures("one_thread")

RUN_SETTINGS = UNTRIED
# Embedding scales, post-norms, position embeddings, LayerNorms with and without weights, parallel blocks, residual
# multipliers, experts and state-space layers.
FAMILIES = (
    "llama", "gemma", "gemma3", "gpt2", "gpt_neox", "opt projected", "olmo", "olmo2", "granite", "cohere", "glm4",
    "qwen3_moe", "gpt_oss", "falcon_h1", "mamba2",
)  # fmt: skip


def some_directions() -> Directions:
    """A direction and means at every layer but the first, where both sides are the same."""
    generator = torch.Generator().manual_seed(11)
    shape = (1, LAYERS + 1, WIDTH)
    diffs, negative = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    diffs[:, 0] = 0
    return Directions((-1,), diffs, means=negative + diffs / 2, negative_means=3 * negative)


def choose(scope: str = "all", **fields) -> EditConfig:
    place = {"position": -1, "layer": None if fields.get("per_layer") else 2}
    return EditConfig(method="ablate", to="harmless-mean", scope=scope, **place, **fields)


def intervention_for(base: Base, choice: EditConfig) -> Intervention:
    layer_norm = base.architecture.norms.kind == "layer"
    return intervention_from_directions(choice, some_directions(), [2, 0, 3, 1], layer_norm=layer_norm)


def streams(model) -> list[torch.Tensor]:
    """The stream at the input of every block and of the head's norm, [batch, tokens, d] each."""
    taken: dict[int, torch.Tensor] = {}
    with capturing_inputs(model, lambda layer, hidden: taken.setdefault(layer, hidden.detach().clone())):
        logits(model)
    return [taken[layer] for layer in range(LAYERS + 1)]


def hooked_streams(base: Base, intervention: Intervention) -> list[torch.Tensor]:
    with intervened(base.model, intervention):
        return streams(base.model)


def written(base: Base, intervention: Intervention, out: Path):
    out.mkdir()
    bake(base.checkpoint, intervention).write(out)
    return load_tiny(out)


def visible(base: Base, vector: torch.Tensor) -> torch.Tensor:
    """What the family's norms see of a vector."""
    return vector - vector.mean(-1, keepdim=True) if base.architecture.norms.kind == "layer" else vector


@pytest.mark.parametrize("name", FAMILIES)
def test_stream_has_the_harmless_component_at_every_token(name, bases, tmp_path):
    """The theorem: with every write in scope, h . r = m . r for every token at every layer, by hooks and by weights."""
    base, directions = bases(name), some_directions()
    unit = torch.nn.functional.normalize(visible(base, directions.mean_diff(-1, 2)), dim=0)
    wanted = (unit @ visible(base, directions.negative_mean(-1, 2))).item()
    assert abs(wanted) > 0.1, "the harmless mean has a component, so that zero would be noticed"
    intervention = intervention_for(base, choose())
    found = {
        "base": streams(base.model),
        "hooks": hooked_streams(base, intervention),
        "weights": streams(written(base, intervention, tmp_path / "edited")),
    }
    gaps = {kind: max((h @ unit - wanted).abs().max().item() for h in each) for kind, each in found.items()}
    assert gaps["base"] > 0.1
    assert gaps["hooks"] <= EXACT
    assert gaps["weights"] <= EXACT


@pytest.mark.parametrize("scope", ["all", "upto:3", "layers:1-2", "one"])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_equal_hooks_or_the_edit_is_refused(name, scope, bases, tmp_path):
    base = bases(name)
    intervention = intervention_for(base, choose(scope))
    assert sum(affine.shifts for affine in intervention.writes.values()) == 1
    if scope not in ("all", "upto:3") and name not in ACTADD:
        with pytest.raises(OrthogonalizeError, match="no bias at mlp"):
            bake(base.checkpoint, intervention)
        return
    assert compare(base, intervention, tmp_path / "edited", rescaled=base.post_norm) <= EXACT


@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per layer"])
def test_blocks_in_scope_add_their_harmless_mean(per_layer, bases):
    """Over layers, what those blocks add along their directions is what they add to harmless prompts on average."""
    base, directions = bases("llama"), some_directions()
    found = hooked_streams(base, intervention_for(base, choose("layers:1-2", per_layer=per_layer)))
    spans = [(1, 2), (2, 3)] if per_layer else [(1, 3)]  # from the input of a block to that of another
    for first, last in spans:
        unit = directions.basis("dim", -1, last if per_layer else 2)[0]
        added = (found[last] - found[first]) @ unit
        wanted = unit @ (directions.negative_mean(-1, last) - directions.negative_mean(-1, first))
        assert (added - wanted).abs().max() <= EXACT
    plain = streams(base.model)
    assert ((plain[2] - plain[1]) @ unit).std() > 0.1, "the base's blocks do not add a constant"


def test_each_layer_keeps_its_own_harmless_mean(bases, tmp_path):
    base = bases("llama")
    intervention = intervention_for(base, choose("layers:0-3", per_layer=True))
    assert [str(site) for site, affine in intervention.writes.items() if affine.shifts] == [
        f"mlp.{layer}" for layer in range(LAYERS)
    ]
    assert compare(base, intervention, tmp_path / "edited") <= EXACT


def test_strength_moves_that_share_of_the_way(bases):
    base, directions = bases("llama"), some_directions()
    unit, mean = directions.basis("dim", -1, 2)[0], directions.negative_mean(-1, 2)
    before, after = streams(base.model)[0] @ unit, hooked_streams(base, intervention_for(base, choose(strength=0.3)))
    assert (after[0] @ unit - (0.7 * before + 0.3 * unit @ mean)).abs().max() <= EXACT


def test_zero_is_the_default_and_adds_no_shift(bases):
    choice = choose()
    plain = EditConfig(**choice.model_dump(exclude={"to"}))
    assert plain.to == "zero"
    edits = [intervention_from_directions(each, some_directions()) for each in (plain, choice)]
    assert not any(affine.shifts for affine in edits[0].writes.values())
    assert edits[1].writes[Site("embed")].shifts
    for site, affine in edits[0].writes.items():
        assert torch.equal(affine.u, edits[1].writes[site].u)
        assert torch.equal(affine.v, edits[1].writes[site].v)
    assert "harmless" not in plain.describe()
    assert "to the harmless mean" in choice.describe()


def test_effect_on_the_stream_is_the_whole_edit():
    """`sweep --semantics residual` maps the stream itself: with the shift, also where only the last write has it."""
    directions, choice = some_directions(), choose("layers:1-2")
    affine = METHODS["ablate"].on_stream(choice, directions, intervention_from_directions(choice, directions))
    unit = directions.basis("dim", -1, 2)[0]
    h = torch.randn(5, WIDTH, dtype=torch.float64)
    assert torch.allclose(affine(h) @ unit, (unit @ directions.negative_mean(-1, 2)).expand(5), atol=1e-12)


def test_recipe_gives_the_same_edit_back(bases, tmp_path):
    base = bases("llama")
    intervention = intervention_for(base, choose())
    stored = store_maps(intervention)
    origin = RecipeBase(model="m", revision=None, architecture="llama", weights={})
    source = Source(kind="run", fingerprint=stored.fingerprint)
    recipe = Recipe(version="0", base=origin, choice=choose(), source=source, maps=stored.maps, arrays=stored.arrays)
    recipe.save(tmp_path)
    back = load_recipe(tmp_path)
    assert back.choice == choose()
    for site, affine in back.intervention().writes.items():
        assert all(torch.equal(getattr(affine, name), getattr(intervention.writes[site], name)) for name in "uvs")


@pytest.mark.parametrize("name", sorted(EMBEDDING_REFUSED))
def test_embedding_that_cannot_hold_a_constant_is_refused(name, bases):
    base = bases(name)
    with pytest.raises(
        OrthogonalizeError,
        match=r"has no bias, so what comes from images|vLLM always takes|cannot be edited by the embedding",
    ):
        bake(base.checkpoint, intervention_for(base, choose()))


def test_inexact_or_unknown_means_are_refused():
    directions = some_directions()
    with pytest.raises(OrthogonalizeError, match=r"harmless-mean cannot use scope 'from'.*--to zero with from:l"):
        intervention_from_directions(choose("from:2"), directions)
    with pytest.raises(OrthogonalizeError, match="position -1, layer 0"):
        intervention_from_directions(choose().model_copy(update={"layer": 0}), directions)
    without = dataclasses.replace(directions, negative_means=None)
    with pytest.raises(OrthogonalizeError, match="stored without the negative side's means; extract them again"):
        intervention_from_directions(choose(), without)
    intervention_from_directions(choose().model_copy(update={"to": "zero"}), without)
    with pytest.raises(OrthogonalizeError, match="needs the means that extract stores; use --run"):
        intervention_from_basis(choose(), torch.eye(WIDTH, dtype=torch.float64)[:1], 1.0, LAYERS)


def test_edit_from_a_run_rebuilds_and_verifies(model, run, tmp_path):
    words = ("--run", run, "--method", "ablate", "--to", "harmless-mean", "--layer", "2", "--position", "-1")
    status, said = command("edit", model, "--out", tmp_path / "edited", *words)
    assert status == 0, said
    recipe = load_recipe(tmp_path / "edited")
    assert (recipe.choice.to, recipe.choice.scope) == ("harmless-mean", "all")
    directions = load_run(run).directions
    unit = directions.basis("dim", -1, 2)[0]
    shift = recipe.intervention().writes[Site("embed")].s
    assert torch.allclose(shift, unit * (unit @ directions.negative_mean(-1, 2)), atol=1e-12)
    card = (tmp_path / "edited" / "README.md").read_text()
    assert "to the harmless mean" in card
    assert "Remaining along the direction" not in card
    status, said = command("verify", tmp_path / "edited", "--base", model)
    assert status == 0, said
    rebuild = ("--recipe", tmp_path / "edited" / "orthogonalize.json")
    status, said = command("edit", model, "--out", tmp_path / "again", *rebuild)
    assert status == 0, said
    for file in open_checkpoint(tmp_path / "edited").files:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "edited" / file).read_bytes()


def test_command_line_says_what_harmless_mean_needs(model, run, tmp_path):
    out, to = ("--out", tmp_path / "edited"), ("--to", "harmless-mean")
    status, said = command("edit", model, "--run", run, *out, "--method", "nullspace", *to)
    assert (status, said) == (1, "error: --to belongs to ablate, not to nullspace")
    save_file({"direction": torch.ones(load_run(run).info.width)}, tmp_path / "direction.safetensors")
    status, said = command("edit", model, "--direction", tmp_path / "direction.safetensors", *out, *to)
    assert (status, said) == (1, "error: --to harmless-mean needs the means that extract stores; use --run")
    old = tmp_path / "old"
    old.mkdir()
    for file in run.iterdir():
        if file.is_file():
            (old / file.name).write_bytes(file.read_bytes())
    tensors = load_file(old / "directions.safetensors")
    del tensors["negative_means"]
    save_file(tensors, old / "directions.safetensors")
    status, said = command("edit", model, "--run", old, *out, "--method", "ablate", "--scope", "all", *to)
    assert status == 1
    assert "stored without the negative side's means; extract them again" in said
    status, said = command("edit", model, "--run", old, *out, "--method", "ablate", "--scope", "all")
    assert status == 0, said
