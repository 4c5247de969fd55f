"""Baked weights equal hooks on a tiny Llama, for every method and scope."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.llama import LAYERS, WIDTH, load, logits, store, tiny_llama

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.checkpoints.tensor_edit import TensorEdit
from orthogonalize.core.interventions import removal, shift
from orthogonalize.directions.direction_set import Directions
from orthogonalize.directions.leace import leace
from orthogonalize.edits.bake import bake
from orthogonalize.edits.build import intervention_from_directions
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.scopes import map_sites, parse_scope, shift_sites
from orthogonalize.models.hooks import intervened

RANKING = [2, 0, 3, 1]
WRITE_SCOPES = ["all", "one", "top:50%", "layers:0,2-3", "upto:3"]
MAPS = {
    "ablate": lambda basis: removal(basis[:1]),
    "ablate, strength 0.6": lambda basis: removal(basis[:1], 0.6),
    "nullspace": lambda basis: removal(basis),
    "reflect": lambda basis: removal(basis, 2.0),
    "reflect, alpha 1.5": lambda basis: removal(basis, 1.5),
}


def baked(source: Path, intervention, out: Path) -> Path:
    out.mkdir()
    bake(open_checkpoint(source), intervention).write(out)
    return out


def gap(source: Path, edited: Path, intervention, renormalise: bool = True) -> float:
    """Largest difference of a logit between hooks on the base and the baked checkpoint."""
    model = load(source)
    plain = logits(model)
    with intervened(model, intervention, renormalise):
        hooked = logits(model)
    assert (hooked - plain).abs().max() > 1e-2, "the intervention did nothing, so nothing was compared"
    return (hooked - logits(load(edited))).abs().max().item()


def per_layer(method: str):
    """A separate direction for every stream, and none for the first, as extraction gives."""
    generator = torch.Generator().manual_seed(9)
    bases = [
        torch.linalg.qr(torch.randn(WIDTH, 3, generator=generator, dtype=torch.float64))[0].T for _ in range(LAYERS + 1)
    ]
    return lambda stream: MAPS[method](bases[stream]) if stream else None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scope", WRITE_SCOPES)
@pytest.mark.parametrize("method", MAPS)
def test_baked_write_sites_equal_hooks(method, scope, tied, basis, tmp_path):
    source = store(tiny_llama(tie_word_embeddings=tied), tmp_path / "base", shards=2)
    intervention = map_sites(parse_scope(scope), LAYERS, lambda _: MAPS[method](basis), 2, RANKING)
    assert gap(source, baked(source, intervention, tmp_path / "edited"), intervention) <= 1e-9


@pytest.mark.parametrize("scope", [*WRITE_SCOPES, "from:2"])
@pytest.mark.parametrize("method", MAPS)
def test_per_layer_directions_equal_hooks(method, scope, base, tmp_path):
    intervention = map_sites(parse_scope(scope), LAYERS, per_layer(method), 2, RANKING)
    edited = baked(base, intervention, tmp_path / "edited")
    assert gap(base, edited, intervention, renormalise=False) <= 1e-9


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per layer"])
@pytest.mark.parametrize("scope", WRITE_SCOPES)
def test_baked_erasers_equal_hooks(scope, per_layer, strength, tied, tmp_path):
    """LEACE: oblique, with the shift in one place (or, with an eraser per layer, one per block)."""
    generator = torch.Generator().manual_seed(3)
    shape = (1, LAYERS + 1, WIDTH)
    diffs, means, readers = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    readers = torch.where((readers * diffs).sum(-1, keepdim=True) > 0, readers, -readers)
    diffs[:, 0] = 0  # at a template token both sides have the same embedding
    directions = Directions((-1,), diffs, {}, means, readers)
    source = store(tiny_llama(tie_word_embeddings=tied), tmp_path / "base")
    choice = EditConfig(method="leace", scope=scope, position=-1, layer=2, per_layer=per_layer, strength=strength)
    intervention = intervention_from_directions(choice, directions, RANKING)
    assert any(m.shifts for m in intervention.writes.values())
    assert gap(source, baked(source, intervention, tmp_path / "edited"), intervention) <= 1e-9


def test_whole_model_eraser_erases_the_fitted_stream(basis, tmp_path):
    """The shift goes in once: the stream at the fitted layer is the eraser applied to the base's stream there."""
    generator = torch.Generator().manual_seed(4)
    sides = [torch.randn(30, 1, LAYERS + 1, WIDTH, generator=generator) + s for s in (1.0, -1.0)]
    eraser = leace(*sides)
    directions = Directions((-1,), eraser.u, {}, eraser.mean, eraser.v)
    source = store(tiny_llama(), tmp_path / "base")
    choice = EditConfig(method="leace", scope="all", position=-1, layer=1)
    edited = load(baked(source, intervention_from_directions(choice, directions), tmp_path / "edited"))
    at_one = directions.eraser(-1, 1)
    ids = torch.randint(3, 90, (2, 9), generator=generator)
    with torch.inference_mode():
        before = load(source).model.embed_tokens(ids)
        after = edited.model.embed_tokens(ids)
    assert torch.allclose(after, at_one.affine()(before), atol=1e-12)
    assert torch.allclose(after @ at_one.v, (at_one.v @ at_one.mean).expand(2, 9), atol=1e-12)


@pytest.mark.parametrize("scope", ["all", "one", "top:50%", "layers:0,2-3", "from:2", "layers:0"])
def test_baked_activation_addition_equals_hooks(scope, base, basis, tmp_path):
    intervention = shift_sites(parse_scope(scope), LAYERS, lambda _: 3.0 * basis[0], 2, RANKING)
    assert gap(base, baked(base, intervention, tmp_path / "edited"), intervention) <= 1e-9


def test_existing_biases_are_edited_not_added_again(basis, tmp_path):
    source = store(tiny_llama(attention_bias=True, mlp_bias=True), tmp_path / "base")
    for number, intervention in enumerate(
        [
            map_sites(parse_scope("all"), LAYERS, lambda _: removal(basis)),
            shift_sites(parse_scope("layers:1-3"), LAYERS, lambda _: basis[0]),
        ]
    ):
        edited = baked(source, intervention, tmp_path / f"edited{number}")
        assert gap(source, edited, intervention) <= 1e-9
        assert open_checkpoint(edited).tensors.keys() == open_checkpoint(source).tensors.keys()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("start", [0, 2, LAYERS])
@pytest.mark.parametrize("method", MAPS)
def test_baked_readers_equal_hooks_without_renormalisation(method, start, tied, basis, tmp_path):
    """Up to the scale of the stream, which only hooks can correct."""
    source = store(tiny_llama(tie_word_embeddings=tied), tmp_path / "base")
    intervention = map_sites(parse_scope(f"from:{start}"), LAYERS, lambda _: MAPS[method](basis))
    edited = baked(source, intervention, tmp_path / "edited")
    assert gap(source, edited, intervention, renormalise=False) <= 1e-9


def test_read_side_mirror_is_exact(base, basis, tmp_path):
    intervention = map_sites(parse_scope("from:1"), LAYERS, lambda _: removal(basis, 2.0))
    assert gap(base, baked(base, intervention, tmp_path / "edited"), intervention) <= 1e-9


def test_projecting_the_head_alone_only_rescales_the_logits(base, basis, tmp_path):
    intervention = map_sites(parse_scope(f"from:{LAYERS}"), LAYERS, lambda _: removal(basis))
    model = load(base)
    with intervened(model, intervention):
        hooked = logits(model)
    ratio = logits(load(baked(base, intervention, tmp_path / "edited"))) / hooked
    assert ratio.min() > 0
    assert ratio.max() <= 1 + 1e-9
    assert (ratio.amax(-1) - ratio.amin(-1)).max() < 1e-6


def test_ablating_all_writes_equals_ablating_the_whole_stream(base, basis, tmp_path):
    """The identity that makes weight orthogonalisation work (Arditi et al. 2024, section 4.1)."""
    from orthogonalize.models.hooks import map_input, map_output

    affine = removal(basis)
    model = load(base)
    for layer in model.model.layers:
        map_input(layer, affine)
        map_output(layer.self_attn, affine)
        map_output(layer.mlp, affine)
    intervention = map_sites(parse_scope("all"), LAYERS, lambda _: affine)
    edited = load(baked(base, intervention, tmp_path / "edited"))
    assert (logits(model) - logits(edited)).abs().max() <= 1e-9


def test_float32_checkpoint_stays_close_to_float64_hooks(basis, tmp_path):
    source = store(tiny_llama(), tmp_path / "base", torch.float32)
    intervention = map_sites(parse_scope("all"), LAYERS, lambda _: removal(basis))
    assert gap(source, baked(source, intervention, tmp_path / "edited"), intervention) <= 1e-4


# The tests above must be able to fail: each of these breaks the bake in one way.


def test_head_left_tied_is_noticed(basis, tmp_path):
    source = store(tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    intervention = map_sites(parse_scope("all"), LAYERS, lambda _: removal(basis))
    plan = bake(open_checkpoint(source), intervention)
    plan.checkpoint.additions.clear()
    plan.checkpoint.config_changes.clear()
    (tmp_path / "edited").mkdir()
    plan.write(tmp_path / "edited")
    assert gap(source, tmp_path / "edited", intervention) > 1e-3


def test_wrong_axis_is_noticed(basis, tmp_path):
    square = {"num_attention_heads": 4, "head_dim": 8, "intermediate_size": WIDTH}
    source = store(tiny_llama(**square), tmp_path / "base")
    intervention = map_sites(parse_scope("layers:0-3"), LAYERS, lambda _: removal(basis))
    plan = bake(open_checkpoint(source), intervention)
    for name, edit in plan.checkpoint.edits.items():
        plan.checkpoint.edits[name] = TensorEdit(edit.name, edit.site, 1, edit.affine, edit.part)
    (tmp_path / "edited").mkdir()
    plan.write(tmp_path / "edited")
    assert gap(source, tmp_path / "edited", intervention) > 1e-3


def test_missing_site_is_noticed(base, basis, tmp_path):
    intervention = map_sites(parse_scope("all"), LAYERS, lambda _: removal(basis))
    plan = bake(open_checkpoint(base), intervention)
    del plan.checkpoint.edits["model.layers.3.mlp.down_proj.weight"]
    (tmp_path / "edited").mkdir()
    plan.write(tmp_path / "edited")
    assert gap(base, tmp_path / "edited", intervention) > 1e-3


def test_bias_without_its_config_flag_is_noticed(base, basis, tmp_path):
    intervention = shift_sites(parse_scope("one"), LAYERS, lambda _: 3 * basis[0], 2)
    edited = baked(base, intervention, tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text())
    assert config["mlp_bias"] is True
    (edited / "config.json").write_text(json.dumps(config | {"mlp_bias": False}))
    assert gap(base, edited, intervention) > 1e-3


def test_added_bias_is_the_vector_itself(base, basis, tmp_path):
    intervention = shift_sites(parse_scope("one"), LAYERS, lambda _: basis[0], 2)
    edited = open_checkpoint(baked(base, intervention, tmp_path / "edited"))
    assert torch.equal(edited.read("model.layers.1.mlp.down_proj.bias"), shift(basis[0]).s)
    assert not edited.read("model.layers.2.mlp.down_proj.bias").any()
