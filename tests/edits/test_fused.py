"""Models with fused projections (Phi-3), stored as a Llama: the same bytes under other names."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.chat import tiny_tokenizer
from helpers.exactness import BASIS, EXACT, LAYERS, Base, gap
from helpers.tiny_models import DoublePrecision, load_tiny, logits, store_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orthogonalize import edit, verify
from orthogonalize.checkpoints.checkpoint import INDEX, open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import Intervention, Site, shift
from orthogonalize.edits.bake import bake
from orthogonalize.engines.shared_base import common_folder
from orthogonalize.evals.shared_engine import base_weights, check_pair
from orthogonalize.models.hooks import intervened

pytestmark = pytest.mark.usefixtures("one_thread")
CONSTANT = Intervention({Site("mlp", 1): shift(2 * BASIS[0])})
GROUPED = {"num_key_value_heads": 1}  # so that queries have more rows than keys and values


@pytest.fixture(scope="module")
def phi3(tmp_path_factory) -> Base:
    return Base("phi3", store_tiny("phi3", tmp_path_factory.mktemp("fused") / "phi3", **GROUPED))


def written(base: Base, out):
    out.mkdir()
    plan = bake(base.checkpoint, CONSTANT)
    plan.write(out)
    return plan


@torch.inference_mode()
def gap_over_lengths(base: Base, llama) -> float:
    """Gap between hooks on the base and the Llama, on texts within the original positions and beyond."""
    gaps = []
    for length in (12, 40):
        ids = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(1))
        with DoublePrecision(), intervened(base.model, CONSTANT, renormalise=False):
            hooked = base.model(input_ids=ids, use_cache=False).logits.double()
        with DoublePrecision():
            gaps.append(gap(hooked, llama(input_ids=ids, use_cache=False).logits.double()))
    return max(gaps)


def test_split_projections_hold_the_rows_of_the_fused_ones(phi3, tmp_path):
    """And transformers loads every one of them."""
    written(phi3, tmp_path / "llama")
    edited = {n: t for file in (tmp_path / "llama").glob("*.safetensors") for n, t in load_file(file).items()}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        for fused, parts in {
            "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
        }.items():
            assert f"{block}{fused}.weight" not in edited
            found = torch.cat([edited[f"{block}{part}.weight"] for part in parts])
            assert found.equal(phi3.checkpoint.read(f"{block}{fused}.weight"))
    index = json.loads((tmp_path / "llama" / INDEX).read_text())["weight_map"]
    assert index.keys() == edited.keys()
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with intervened(phi3.model, CONSTANT, renormalise=False):
        hooked = logits(phi3.model)
    assert gap(hooked, logits(load_tiny(tmp_path / "llama"))) <= EXACT
    assert gap(hooked, phi3.plain) > 1e-2


def test_checkpoint_without_an_index_is_renamed_too(tmp_path):
    folder = store_tiny("phi3", tmp_path / "base", torch.bfloat16, **GROUPED)
    (tmp_path / "llama").mkdir()
    plan = bake(open_checkpoint(folder), CONSTANT)
    plan.write(tmp_path / "llama")
    edited = load_file(tmp_path / "llama" / "model.safetensors")
    assert edited.keys() == plan.source.tensors.keys() | plan.checkpoint.additions.keys()
    assert all(edited[name].equal(plan.checkpoint.edited(name)) for name in edited)


@pytest.mark.parametrize("window", [None, 128])
def test_long_rope_is_kept_and_an_unused_window_dropped(window, tmp_path):
    """Phi-3.5: other factors beyond the original positions, and a window longer than any text."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.3 * i for i in range(8)],
    }  # fmt: skip
    settings = {"original_max_position_embeddings": 16, "rope_parameters": rope, "sliding_window": window}
    base = Base("phi3", store_tiny("phi3", tmp_path / "base", **settings, **GROUPED))
    written(base, tmp_path / "llama")
    llama = load_tiny(tmp_path / "llama")
    assert gap_over_lengths(base, llama) <= EXACT


def test_config_in_the_hub_format_gives_the_same_llama(tmp_path):
    """Phi-3.5 there: rope_theta and rope_scaling, a type of `longrope`, and code for older versions of transformers."""
    rope = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.3 * i for i in range(8)]}
    settings = {
        "original_max_position_embeddings": 16,
        "rope_parameters": rope | {"rope_type": "longrope", "rope_theta": 20000.0},
    }
    folder = store_tiny("phi3", tmp_path / "base", **settings, **GROUPED)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    old = {"rope_theta": 20000.0, "rope_scaling": rope | {"type": "longrope"}}
    remote = {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "sliding_window": 262144}
    (folder / "config.json").write_text(json.dumps(config | old | remote))
    (folder / "modeling_phi3.py").write_text("raise SystemExit('this must not run')")
    base = Base("phi3", folder)
    plan = written(base, tmp_path / "llama")
    for trusting in (False, True):
        llama = AutoModelForCausalLM.from_pretrained(
            tmp_path / "llama", dtype=torch.float64, attn_implementation="eager", trust_remote_code=trusting
        ).eval()
        assert type(llama).__name__ == "LlamaForCausalLM"
    assert plan.checkpoint.config_changes["auto_map"] == {}
    assert gap_over_lengths(base, llama) <= EXACT


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sliding_window": 8}, "sliding_window is 8"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
    ],
)
def test_phi3_features_that_llama_lacks_are_refused(settings, reason, tmp_path):
    source = open_checkpoint(store_tiny("phi3", tmp_path / "base", torch.bfloat16, **settings))
    with pytest.raises(OrthogonalizeError, match=f"cannot be stored as a Llama: .*{reason}"):
        bake(source, CONSTANT)


def test_config_that_does_not_fit_the_fused_weights_is_refused(tmp_path):
    folder = store_tiny("phi3", tmp_path / "base", torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 48, "num_key_value_heads": 7}))
    with pytest.raises(OrthogonalizeError, match=r"config\.json does not fit a fused weight of 144 rows"):
        bake(open_checkpoint(folder), CONSTANT)


def test_quantized_fused_weight_is_refused(tmp_path):
    """Each part would need scales of its own."""
    source = store_tiny("phi3", tmp_path / "base", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.gate_up_proj.weight"
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(OrthogonalizeError, match=r"gate_up_proj\.weight as several weights, each with its own scales"):
        bake(open_checkpoint(source), CONSTANT)


@pytest.mark.parametrize("name", ["phi3", "mistral"])
def test_model_stored_as_llama_is_accepted_as_edit_of_its_base(name, tmp_path):
    """By edit in shards, verify and the engines."""
    source = store_tiny(name, tmp_path / "base", torch.float32)
    tiny_tokenizer().save_pretrained(source)
    save_file({"direction": BASIS[0].float()}, tmp_path / "direction.safetensors")
    given = {"direction": tmp_path / "direction.safetensors", "method": "actadd", "layer": 2, "coefficient": 3.0}
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    edit(str(source), whole, **given)
    for share in ("1/2", "2/2"):
        edit(str(source), shared, shard=share, **given)
    for file in whole.iterdir():
        assert file.name == "orthogonalize.json" or file.read_bytes() == (shared / file.name).read_bytes(), file
    proof = verify(whole)
    assert proof.verification.passed, proof.verification
    assert not proof.missing
    check_pair(whole, source)
    weights = base_weights(whole, source)
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = torch.arange(3, 20).unsqueeze(0)
    model.load_state_dict({key: make() for key, make in weights.items()}, strict=not model.config.tie_word_embeddings)
    expected = AutoModelForCausalLM.from_pretrained(source)
    with torch.inference_mode():
        assert (model(input_ids=ids).logits - expected(input_ids=ids).logits).abs().max() < 1e-5


def test_other_model_type_without_a_recipe_is_not_an_edit(phi3, tmp_path):
    written(phi3, tmp_path / "llama")
    with pytest.raises(OrthogonalizeError, match="different kinds of model"):
        check_pair(tmp_path / "llama", phi3.folder)


def test_shared_engine_folder_computes_what_the_base_does(phi3):
    embedding = Intervention({Site("embed"): shift(BASIS[0])})
    plans = [bake(phi3.checkpoint, intervention).checkpoint for intervention in (CONSTANT, embedding)]
    with common_folder(phi3.checkpoint, plans) as folder:
        held = open_checkpoint(folder)
        assert held.tensors.keys() == plans[0].source.tensors.keys() | plans[0].additions.keys()
        assert gap(logits(load_tiny(folder)), phi3.plain) <= EXACT
