"""A tensor whose shape the configuration or the map does not expect ends the edit before anything is written."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest
import torch
from helpers.exactness import Base, ablation, every_read, every_write_matrix
from helpers.llama import store, tiny_llama
from helpers.memory_use import memory_growth
from helpers.tiny_models import store_tiny
from safetensors.torch import load_file, save_file

from orthogonalize.architectures.schema import Architecture, architecture_of
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import ConditionalMap, Intervention, Site, removal, shift
from orthogonalize.edits.bake import bake
from orthogonalize.edits.constant_vectors import _value_bias
from orthogonalize.edits.plan import EditPlan
from orthogonalize.edits.recipe import Array, ConditionalRecord, load_recipe, store_maps
from orthogonalize.edits.sharding import RECORD, Share, assemble

DOWN, EMBEDDING, O_PROJ = (
    "model.layers.1.mlp.down_proj.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.o_proj.weight",
)


def with_shape(source: Path, target: Path, name: str, *shape: int, dtype: torch.dtype | None = None) -> Path:
    """A copy of a checkpoint in which one tensor has another shape."""
    target.mkdir()
    found = False
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        if name in tensors:
            found, tensors[name] = True, torch.ones(shape, dtype=dtype or tensors[name].dtype)
        save_file(tensors, target / file.name)
    assert found, name
    return target


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return store(tiny_llama(), tmp_path_factory.mktemp("shapes") / "base", torch.bfloat16)


@pytest.fixture(scope="module")
def direction(llama, tmp_path_factory) -> Path:
    width = json.loads((llama / "config.json").read_text())["hidden_size"]
    file = tmp_path_factory.mktemp("direction") / "direction.pt"
    torch.save(torch.randn(width, generator=torch.Generator().manual_seed(0)), file)
    return file


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        (DOWN, (2, 300_000), None),
        (DOWN, (1, 4_000_000), None),
        (EMBEDDING, (400, 16), torch.float32),
        (EMBEDDING, (400, 16), None),
        (O_PROJ, (0, 64), None),
        (O_PROJ, (4096,), None),
        (O_PROJ, (4, 16, 64), None),
    ],
)
def test_wrong_tensor_is_named_with_its_shape(name, shape, dtype, llama, direction, tmp_path):
    base = with_shape(llama, tmp_path / "base", name, *shape, dtype=dtype)
    with pytest.raises(OrthogonalizeError) as error:
        edit(str(base), tmp_path / "out", direction=direction, method="ablate", scope="all")
    said = str(error.value)
    assert name in said
    assert str(list(shape)) in said
    assert "\n" not in said
    assert len(said) < 300
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", (4, 48, 32)),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", (3, 48, 48)),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj_bias", (4, 47)),
        ("granitemoe", "model.layers.1.block_sparse_moe.output_linear.weight", (4, 32, 48)),
        ("gpt2", "transformer.h.1.mlp.c_proj.weight", (192, 32)),
        ("gpt2", "transformer.h.1.mlp.c_proj.bias", (32,)),
        ("gpt2", "transformer.wpe.weight", (128, 32)),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w2.weight", (47, 56)),
        ("gemma2", "model.layers.1.post_attention_layernorm.weight", (47,)),
    ],
)
def test_wrong_shape_is_refused_in_every_layout_of_a_write(family, name, shape, tmp_path):
    source = store_tiny(family, tmp_path / "whole")
    base = open_checkpoint(with_shape(source, tmp_path / "base", name, *shape))
    with pytest.raises(OrthogonalizeError, match=r"shape .*needs?|has the shape"):
        bake(base, ablation())


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight", (64, 47)),
        ("llama", "model.layers.1.input_layernorm.weight", (47,)),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", (4, 47, 96)),
    ],
)
def test_wrong_shape_is_refused_in_every_layout_of_a_read(family, name, shape, tmp_path):
    source = store_tiny(family, tmp_path / "whole")
    base = open_checkpoint(with_shape(source, tmp_path / "base", name, *shape))
    with pytest.raises(OrthogonalizeError, match="has the shape"):
        bake(base, every_read(1))


def test_constant_of_a_wrong_bias_is_refused(tmp_path):
    name = "transformer.h.1.mlp.c_proj.bias"
    base = open_checkpoint(with_shape(store_tiny("gpt2", tmp_path / "whole"), tmp_path / "base", name, 47))
    with pytest.raises(OrthogonalizeError, match="has the shape"):
        bake(base, Intervention({Site("mlp", 1): shift(torch.ones(48))}))


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("llama", "model.layers.0.mlp.gate_proj.weight", ()),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", ()),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", (0, 48)),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight", (111, 48)),
    ],
)
def test_constant_beside_a_wrong_projection_is_refused(family, name, shape, tmp_path):
    """Where the biases of all projections are written with the one that holds the constant."""
    base = open_checkpoint(with_shape(store_tiny(family, tmp_path / "whole"), tmp_path / "base", name, *shape))
    with pytest.raises(OrthogonalizeError, match=r"is no matrix|does not fit a fused weight"):
        bake(base, Intervention({Site("mlp", 1): shift(torch.ones(48))}))


@pytest.mark.parametrize("heads", ["many", None, 0, 3, [4]], ids=str)
def test_constant_by_the_values_needs_a_number_of_heads(heads, tmp_path):
    source = store_tiny("qwen3", tmp_path / "base")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_attention_heads": heads}))
    plan, site = EditPlan.of(open_checkpoint(source)), Site("attn", 1)
    with pytest.raises(OrthogonalizeError, match="heads"):
        _value_bias(plan, site, plan.sites.parts(site)[0], torch.ones(48, dtype=torch.float64))


@pytest.mark.parametrize(
    ("shape", "settings"),
    [((1, 3), {}), ((0, 1), {}), ((2, 2), {"weight_block_size": [0, 0]}), ((2, 2), {"weight_block_size": "128"})],
)
def test_scales_that_do_not_cover_the_weight_are_refused(shape, settings, llama, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    folder = tmp_path / "base"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(shape)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    basis = torch.eye(config["hidden_size"], dtype=torch.float64)[:1]
    with pytest.raises(OrthogonalizeError, match="scale"):
        bake(open_checkpoint(folder), Intervention({Site("mlp", 1): removal(basis)}))


@pytest.mark.parametrize("width", [16, 4096])
def test_every_map_of_a_recipe_is_checked(width, llama, direction, tmp_path):
    """Not only the first."""
    edit(str(llama), tmp_path / "edited", direction=direction, method="ablate", scope="layers:0-1")
    recipe = load_recipe(tmp_path / "edited")
    wrong = load_recipe(tmp_path / "edited")
    basis = torch.eye(width, dtype=torch.float64)[:1]
    stored = store_maps(Intervention({Site("mlp", 1): removal(basis)}))
    recipe.maps[0].sites.remove("mlp.1")
    recipe.maps, recipe.arrays = recipe.maps + stored.maps, recipe.arrays | stored.arrays
    (tmp_path / "wrong.json").write_text(recipe.model_dump_json())
    with pytest.raises(OrthogonalizeError, match="widths"):
        edit(str(llama), tmp_path / "out", recipe=tmp_path / "wrong.json")
    key = wrong.maps[0].u
    values = store_maps(Intervention({Site("mlp", 1): shift(torch.tensor([float("nan")]))})).arrays
    nan = next(iter(a for a in values.values() if a.shape == [1]))
    wrong.arrays[key] = nan
    (tmp_path / "nan.json").write_text(wrong.model_dump_json())
    with pytest.raises(OrthogonalizeError, match="NaN"):
        edit(str(llama), tmp_path / "out", recipe=tmp_path / "nan.json")


@pytest.mark.parametrize(
    "change",
    [
        {"layer": "layers.{layer:>9999999999}"},
        {"layer": "layers.{layer.__class__}"},
        {"layer_count": ["vocab_size"]},
        {"expert_count": ["vocab_size"], "mlp": {"mlp": {"module": "mlp", "writes": {"experts.{expert}.w": 0}}}},
    ],
    ids=str,
)
def test_a_description_in_a_recipe_asks_for_no_memory(change, llama, direction, tmp_path):
    """It is a stranger's, as is the configuration, which has any number at the key that it names."""
    base = with_shape(llama, tmp_path / "base", DOWN, 32, 48)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 2**53}))
    recipe = load_recipe(edited(llama, direction, tmp_path / "edited"))
    known = architecture_of(config).model_dump()
    recipe.description = Architecture.model_validate(known | change)
    recipe.save(tmp_path / "edited")
    began = time.monotonic()
    with memory_growth() as growth, pytest.raises(OrthogonalizeError):
        edit(str(base), tmp_path / "out", recipe=tmp_path / "edited" / "orthogonalize.json")
    assert time.monotonic() - began < 30
    assert growth.bytes < 2**30


def edited(base: Path, direction: Path, out: Path) -> Path:
    edit(str(base), out, direction=direction, method="ablate", scope="layers:0-1")
    return out


@pytest.mark.parametrize("shape", [(3,), (2, 32, 1), (32, 3000), (0, 0)], ids=str)
def test_a_map_of_a_recipe_is_one_matrix_of_few_directions(shape, llama, direction, tmp_path):
    """A rank above the width would take minutes, and more memory than there is."""
    edit(str(llama), tmp_path / "edited", direction=direction, method="ablate", scope="layers:0-1")
    recipe = load_recipe(tmp_path / "edited")
    for key, name in ((recipe.maps[0].u, "u"), (recipe.maps[0].v, "v"), (recipe.maps[0].s, "s")):
        given = torch.ones(shape if name != "s" else shape[:-1], dtype=torch.float64)
        data = base64.b64encode(given.numpy().tobytes()).decode()
        recipe.arrays[key] = Array(shape=list(given.shape), data=data)
    (tmp_path / "wrong.json").write_text(recipe.model_dump_json())
    with pytest.raises(OrthogonalizeError, match=r"maps are damaged|width|changes nothing"):
        edit(str(llama), tmp_path / "out", recipe=tmp_path / "wrong.json")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("change", ["narrow", "wide", "swapped", "flat", "expert"])
def test_conditional_map_must_have_the_inputs_of_its_matrix(family, change, tmp_path):
    """Also where experts times inputs is the right number."""
    base = Base(family, tmp_path / "base")
    matrices = dict(every_write_matrix(base).conditional)
    matrix, each = max(matrices.items(), key=lambda item: item[1].c.dim())
    changed = {
        "narrow": lambda c: c[..., :-1],
        "wide": lambda c: torch.cat([c, c[..., :1]], -1),
        "swapped": lambda c: c.reshape(c.shape[-1] if c.dim() == 3 else 1, c.shape[-2], -1),
        "flat": lambda c: c[0] if c.dim() == 3 else c[None],
        "expert": lambda c: torch.cat([c, c[:1]]) if c.dim() == 3 else torch.stack([c, c]),
    }
    matrices[matrix] = ConditionalMap(each.r, changed[change](each.c))
    with pytest.raises(OrthogonalizeError, match="fitted to another model"):
        bake(base.checkpoint, Intervention(conditional=matrices))


def test_untied_head_that_is_not_stored_is_refused(direction, tmp_path):
    """The head would be made up, as a copy of the embedding, and the checkpoint would look whole."""
    base = store(tiny_llama(tie_word_embeddings=True), tmp_path / "base", torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    edit(str(base), tmp_path / "tied", direction=direction, scope="all")
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(OrthogonalizeError, match=r"lacks lm_head\.weight"):
        edit(str(base), tmp_path / "out", direction=direction, scope="all")
    assert not (tmp_path / "out").exists()


def test_shares_of_different_conditional_maps_are_not_assembled(llama, direction, tmp_path):
    edit(str(llama), tmp_path / "edited", direction=direction, scope="all")
    recipe = load_recipe(tmp_path / "edited")
    for share in Share.parse("1/2").all():
        share.folder(tmp_path / "out").mkdir(parents=True)
        matrix = f"mlp:{share.number}:mlp.down_proj"
        recipe.conditional = [ConditionalRecord(matrix=matrix, r="a", c="b")]
        (share.folder(tmp_path / "out") / RECORD).write_text(recipe.model_dump_json())
    with pytest.raises(OrthogonalizeError, match="shares of different edits"):
        assemble(None, Share.parse("1/2"), tmp_path / "out", tmp_path / "partial")
