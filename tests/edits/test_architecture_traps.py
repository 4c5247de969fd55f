"""What is easily got wrong in families other than Llama, one trap per test."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.exactness import (
    BASIS,
    EXACT,
    LAYERS,
    Base,
    ablation,
    baked_logits,
    compare,
    every_write,
    gap,
    gap_of,
    gap_without,
    rewritten,
)
from helpers.tiny_models import DoublePrecision, load_tiny, logits, store_tiny
from safetensors.torch import load_file

from orthogonalize.architectures.schema import architecture_of, families
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import Intervention, Site, shift
from orthogonalize.edits.bake import bake
from orthogonalize.models.hooks import intervened

pytestmark = pytest.mark.usefixtures("one_thread")


# Tied heads.


@pytest.mark.parametrize("name", ["gemma3 multimodal", "qwen3_5 multimodal"])
def test_head_tied_in_a_nested_config_is_untied_at_both_levels(name, bases, tmp_path):
    base = bases(name)
    assert compare(base, ablation(), tmp_path / "edited", rescaled=base.post_norm) <= EXACT
    edited = open_checkpoint(tmp_path / "edited")
    assert edited.config["tie_word_embeddings"] is False
    assert edited.config["text_config"]["tie_word_embeddings"] is False
    prefix = (name.startswith("gemma3") and "language_model.model.") or "model.language_model."
    head = prefix.removesuffix("model.") + "lm_head.weight" if prefix.endswith("l.model.") else "lm_head.weight"
    assert edited.read(head).equal(base.checkpoint.read(prefix + "embed_tokens.weight"))
    other = {k: v for k, v in base.checkpoint.config["text_config"].items() if k != "tie_word_embeddings"}
    assert {k: v for k, v in edited.config["text_config"].items() if k != "tie_word_embeddings"} == other


@pytest.mark.parametrize(
    ("name", "served"),
    [("gemma2", "TransformersForCausalLM"), ("cohere", "TransformersForCausalLM"), ("gemma", None), ("gemma3", None)],
)
def test_head_that_vllm_cannot_untie_goes_to_the_other_backend(name, served, bases):
    """vLLM's backend for transformers' classes can run it untied."""
    plan = bake(bases(name).checkpoint, ablation())
    assert plan.checkpoint.config_changes.get("architectures") == ([served] if served else None)
    assert "architectures" not in bake(bases(name).checkpoint, ablation("layers:0-3")).checkpoint.config_changes


def test_head_that_no_server_can_untie_is_refused(bases, tmp_path):
    """With the scopes that work."""
    base = bases("lfm2")
    for scope in ("all", "upto:2", "from:1"):
        with pytest.raises(OrthogonalizeError, match=r"vLLM always takes the embedding of lfm2.*layers:"):
            bake(base.checkpoint, ablation(scope))
    assert compare(base, ablation("layers:0-3"), tmp_path / "edited") <= EXACT


@pytest.mark.parametrize(("name", "head"), [("gpt_neox", "embed_out.weight"), ("gpt2", "lm_head.weight")])
def test_untied_head_by_another_name_keeps_its_values(name, head, tmp_path):
    source = store_tiny(name, tmp_path / "base", tie_word_embeddings=True)
    checkpoint = open_checkpoint(source)
    assert head not in checkpoint.tensors
    plan = bake(checkpoint, ablation())
    assert plan.checkpoint.additions.keys() == {head}
    assert gap_of(source, plan, ablation(), tmp_path / "edited") <= EXACT


# Multipliers, biases, constants.


@pytest.mark.parametrize(
    ("name", "site", "tensor", "factor"),
    [
        ("granite", Site("embed"), "model.embed_tokens.weight", 3.0),
        ("granite", Site("mlp", 1), "model.layers.1.mlp.down_proj.bias", 0.7),
        ("falcon_h1", Site("attn", 1), "model.layers.1.mamba.out_proj.bias", 1.3),
        ("gemma", Site("embed"), "model.embed_tokens.weight", 48**0.5),
    ],
)
def test_constant_is_divided_by_the_multiplier_behind_it(name, site, tensor, factor, bases):
    base = bases(name)
    plan = bake(base.checkpoint, Intervention({site: shift(BASIS[0])}))
    old = base.checkpoint.read(tensor) if tensor in base.checkpoint.tensors else 0.0
    assert (plan.checkpoint.edited(tensor) - old - BASIS[0] / factor).abs().max() < 1e-12


def test_every_expert_bias_of_gpt_oss_is_edited(bases, tmp_path):
    folder = bases("gpt_oss").folder
    assert gap_without(folder, "down_proj_bias", ablation("layers:1-2"), tmp_path / "without") > 1e-3
    plan = bake(open_checkpoint(folder), Intervention({Site("mlp", 1): shift(BASIS[0])}))
    added = plan.checkpoint.edited("model.layers.1.mlp.experts.down_proj_bias")
    added = added - open_checkpoint(folder).read("model.layers.1.mlp.experts.down_proj_bias")
    assert (added - BASIS[0]).abs().max() < 1e-12
    assert plan.checkpoint.edits.keys() == {"model.layers.1.mlp.experts.down_proj_bias"}


@pytest.mark.parametrize("name", ["phi", "starcoder2", "gpt_neox", "opt"])
def test_omitted_output_bias_is_noticed(name, bases, tmp_path):
    assert gap_without(bases(name).folder, r"\.bias$", ablation("layers:1-2"), tmp_path / "without") > 1e-3


def test_sliding_window_qwen2_uses_its_value_bias(tmp_path):
    """A window in use keeps it from being stored as a Llama, so the constant goes into the value bias."""
    windowed = {"use_sliding_window": True, "sliding_window": 8, "num_key_value_heads": 4}
    base = Base("qwen2", store_tiny("qwen2", tmp_path / "windowed", **windowed))
    assert compare(base, Intervention({Site("attn", 1): shift(BASIS[0])}), tmp_path / "edited") <= EXACT
    plan = bake(base.checkpoint, Intervention({Site("attn", 1): shift(BASIS[0])}))
    assert plan.checkpoint.edits.keys() == {"model.layers.1.self_attn.v_proj.bias"}
    with pytest.raises(OrthogonalizeError, match=r"cannot be stored as a Llama: use_sliding_window is True"):
        bake(base.checkpoint, Intervention({Site("mlp", 1): shift(BASIS[0])}))


def test_value_bias_that_misses_part_of_the_vector_is_refused(tmp_path):
    """One value head, repeated for all queries, spans a third of the stream at most."""
    narrow = open_checkpoint(store_tiny("qwen2_moe", tmp_path / "narrow", num_key_value_heads=1))
    with pytest.raises(OrthogonalizeError, match=r"bias of the value projection misses \d+% of the vector"):
        bake(narrow, Intervention({Site("attn", 1): shift(BASIS[0])}))


def test_model_stored_as_llama_has_every_bias_and_no_window(bases):
    plan = bake(bases("qwen2").checkpoint, Intervention({Site("mlp", 1): shift(BASIS[0])}))
    config = bases("qwen2").checkpoint.config | plan.checkpoint.config_changes
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"] is config["mlp_bias"] is True
    assert not any(config.get(key) for key in ("sliding_window", "use_sliding_window", "layer_types"))
    added = {name.split(".", 3)[3] for name in plan.checkpoint.additions}
    assert added == {"self_attn.o_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"}
    assert len(plan.checkpoint.additions) == 4 * LAYERS


# Writes before the first block, and tensors that are not part of the stream.


@pytest.mark.parametrize(("name", "pattern"), [("gpt2", "wpe"), ("opt", "positions"), ("opt projected", "project_in")])
def test_omitted_position_table_or_projection_is_noticed(name, pattern, bases, tmp_path):
    assert gap_without(bases(name).folder, pattern, ablation(), tmp_path / "edited") > 1e-3


def test_narrow_embedding_behind_a_projection_is_not_edited(bases):
    plan = bake(bases("opt projected").checkpoint, ablation())
    assert "model.decoder.embed_tokens.weight" not in plan.checkpoint.edits
    assert not plan.checkpoint.additions


def test_constant_in_a_position_table_keeps_the_head_tied(bases):
    plan = bake(bases("gpt2").checkpoint, Intervention({Site("embed"): shift(BASIS[0])}))
    assert plan.checkpoint.edits.keys() == {"transformer.wpe.weight"}
    assert not plan.checkpoint.additions
    assert not plan.checkpoint.config_changes


def test_gpt2_checkpoint_without_the_prefix_is_recognised(bases, tmp_path):
    base = bases("gpt2")
    bare = rewritten(
        base.folder, tmp_path / "bare", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()}
    )
    assert gap(logits(load_tiny(bare)), base.plain) == 0
    plan = bake(open_checkpoint(bare), ablation())
    assert "wpe.weight" in plan.checkpoint.edits
    assert gap_of(bare, plan, ablation(), tmp_path / "edited") <= EXACT


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gemma3", "model.layers.1.per_layer_projection.weight"),
        ("llama", "model.embed_tokens_per_layer.weight"),
        ("qwen3_moe", "model.layers.2.mlp.shared_expert.down_proj.weight"),
        ("mistral", "model.layers.0.adapter.weight"),
    ],
)
def test_undescribed_tensor_of_stream_width_is_refused(name, extra, bases, tmp_path):
    """It might write the stream: per-layer embeddings (Gemma 3n and 4), or whatever a variant adds."""
    source = rewritten(bases(name).folder, tmp_path / "base", lambda t: t | {extra: torch.randn(48, 20).double()})
    with pytest.raises(OrthogonalizeError, match=re.escape(extra) + ".*orthogonalize describe"):
        bake(open_checkpoint(source), ablation())


def test_multi_token_prediction_layers_are_left_unchanged(bases, tmp_path):
    base = bases("deepseek_v3")

    def with_prediction(tensors):
        last = {k.replace("layers.3.", f"layers.{LAYERS}."): v + 1 for k, v in tensors.items() if "layers.3." in k}
        return tensors | last | {"mtp.fc.weight": torch.randn(48, 96).double()}

    source = rewritten(base.folder, tmp_path / "base", with_prediction)
    plan = bake(open_checkpoint(source), ablation())
    assert not [name for name in plan.checkpoint.edits if "mtp" in name or f"layers.{LAYERS}." in name]
    (tmp_path / "edited").mkdir()
    plan.write(tmp_path / "edited")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "edited"))
    assert before.keys() == after.keys()
    assert "model.layers.4.mlp.experts.0.down_proj.weight" in after
    assert all(after[k].equal(v) for k, v in before.items() if k not in plan.checkpoint.edits)


def test_image_features_are_edited_too(bases, tmp_path):
    base = bases("gemma3 multimodal")
    baked_logits(base, ablation(), tmp_path / "edited")
    ids = torch.tensor([[5, 91, 90, 90, 90, 90, 92, 7, 8]])
    image = {"pixel_values": torch.randn(1, 3, 28, 28).double(), "token_type_ids": (ids == 90).long()}

    def run(model) -> torch.Tensor:
        with torch.inference_mode(), DoublePrecision():
            return model(input_ids=ids, **image, use_cache=False).logits

    edited = load_tiny(tmp_path / "edited")
    with intervened(base.model, ablation(), renormalise=False):
        hooked = run(base.model)
    assert gap(hooked, run(base.model)) > 1e-2
    assert gap(hooked, run(edited)) <= EXACT
    assert gap_without(base.folder, "multi_modal_projector", ablation(), tmp_path / "without") <= EXACT
    without = load_tiny(tmp_path / "without")
    assert gap(hooked, run(without)) > 1e-3


@pytest.mark.parametrize("name", ["gemma3 multimodal", "ministral3 multimodal", "llama4 multimodal"])
def test_constant_that_image_features_cannot_carry_is_refused(name, bases):
    with pytest.raises(OrthogonalizeError, match="what comes from images cannot be shifted"):
        bake(bases(name).checkpoint, Intervention({Site("embed"): shift(BASIS[0])}))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_both_prefixes_of_a_wrapper_are_recognised(prefix, bases, tmp_path):
    projector = "multi_modal_projector.mm_input_projection_weight"
    root = "model." if prefix.startswith("model.") else ""  # everything outside the text model is beside it

    def renamed(tensors):
        text = {k.replace("language_model.model.", prefix): v for k, v in tensors.items() if "language_model" in k}
        return text | {root + k: v for k, v in tensors.items() if "language_model" not in k}

    source = rewritten(bases("gemma3 multimodal").folder, tmp_path / "base", renamed)
    plan = bake(open_checkpoint(source), ablation())
    assert {prefix + "embed_tokens.weight", root + projector} <= plan.checkpoint.edits.keys()
    assert gap_of(source, plan, ablation(), tmp_path / "edited") <= EXACT


def test_unknown_vision_projector_name_is_refused(bases, tmp_path):
    """A model with a vision encoder whose projector has another name would be left partly unedited."""

    def renamed(tensors):
        return {k.replace("multi_modal_projector.", "connector."): v for k, v in tensors.items()}

    source = rewritten(bases("gemma3 multimodal").folder, tmp_path / "base", renamed)
    with pytest.raises(OrthogonalizeError, match=r"lacks multi_modal_projector.*residual stream of gemma3 models"):
        bake(open_checkpoint(source), ablation())


def test_architecture_files_name_each_tensor_once():
    """Nothing is both read and written, or both written and inert."""
    for model_type, architecture in families().items():
        assert architecture_of({"model_type": model_type, "text_config": {}}) is architecture
        for part in (*architecture.attn.values(), *architecture.mlp.values()):
            assert not part.writes.keys() & part.reads.keys()
            assert not part.writes.keys() & set(architecture.inert)


def test_editing_twice_is_the_same_as_once(bases, tmp_path):
    """A removal leaves nothing to remove, at every kind of site."""
    base = bases("granitemoehybrid")
    (tmp_path / "once").mkdir()
    bake(base.checkpoint, every_write()).write(tmp_path / "once")
    (tmp_path / "twice").mkdir()
    bake(open_checkpoint(tmp_path / "once"), every_write()).write(tmp_path / "twice")
    assert gap(logits(load_tiny(tmp_path / "once")), logits(load_tiny(tmp_path / "twice"))) <= EXACT
    assert json.loads((tmp_path / "twice" / "config.json").read_text())["tie_word_embeddings"] is False
