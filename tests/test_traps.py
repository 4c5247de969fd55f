"""What is easily got wrong when the weights of other families than Llama are edited, each on its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from harness import BASIS, EXACT, LAYERS, Base, baked_logits, compare, every_write, gap
from safetensors.torch import load_file, save_file
from tiny_models import DoublePrecision, load_tiny, logits, store_tiny

from orthogonalize.architectures import architecture_of, families
from orthogonalize.baking import Bake, bake
from orthogonalize.checkpoint import INDEX, open_checkpoint
from orthogonalize.editing import edit
from orthogonalize.errors import OrthogonalizeError
from orthogonalize.hooks import Stream, capturing_inputs, intervened
from orthogonalize.interventions import Intervention, Site, conjugated, removal, shift
from orthogonalize.scopes import map_sites, parse_scope

pytestmark = pytest.mark.usefixtures("one_thread")
ABLATE = removal(BASIS[:1])


def ablation(scope: str = "all") -> Intervention:
    return map_sites(parse_scope(scope), LAYERS, lambda _: ABLATE)


def rewritten(source: Path, out: Path, change) -> Path:
    """A copy of a checkpoint in one file, its tensors (by name) put through `change`."""
    out.mkdir()
    tensors = {name: t for file in sorted(source.glob("*.safetensors")) for name, t in load_file(file).items()}
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, out / "model.safetensors", {"format": "pt"})
    for file in source.glob("*.json"):
        if file.name != INDEX:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def gap_of(source: Path, plan: Bake, intervention: Intervention, out: Path) -> float:
    """The gap between hooks on `source` and what `plan` writes."""
    out.mkdir()
    plan.write(out)
    model = load_tiny(source)
    with intervened(model, intervention, renormalise=False):
        hooked = logits(model)
    return gap(hooked, logits(load_tiny(out)))


def gap_without(source: Path, pattern: str, intervention: Intervention, out: Path) -> float:
    """The gap where the edits of all tensors whose names match `pattern` are left out."""
    plan = bake(open_checkpoint(source), intervention)
    left_out = [name for name in plan.edits if re.search(pattern, name)]
    assert left_out, "nothing was left out"
    for name in left_out:
        del plan.edits[name]
    return gap_of(source, plan, intervention, out)


# Tied heads.


@pytest.mark.parametrize("name", ["gemma3 multimodal", "qwen3_5 multimodal"])
def test_a_head_tied_in_a_nested_configuration_is_untied_at_both_levels(name, bases, tmp_path):
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
def test_a_head_that_the_served_class_cannot_untie_goes_to_the_backend_that_can(name, served, bases):
    plan = bake(bases(name).checkpoint, ablation())
    assert plan.config_changes.get("architectures") == ([served] if served else None)
    assert "architectures" not in bake(bases(name).checkpoint, ablation("layers:0-3")).config_changes


def test_a_head_that_no_server_can_untie_is_refused_with_the_scopes_that_work(bases, tmp_path):
    base = bases("lfm2")
    for scope in ("all", "upto:2", "from:1"):
        with pytest.raises(OrthogonalizeError, match=r"vLLM always takes the embedding of lfm2.*layers:"):
            bake(base.checkpoint, ablation(scope))
    assert compare(base, ablation("layers:0-3"), tmp_path / "edited") <= EXACT


@pytest.mark.parametrize(("name", "head"), [("gpt_neox", "embed_out.weight"), ("gpt2", "lm_head.weight")])
def test_a_head_by_another_name_keeps_its_values(name, head, tmp_path):
    source = store_tiny(name, tmp_path / "base", tie_word_embeddings=True)
    checkpoint = open_checkpoint(source)
    assert head not in checkpoint.tensors
    plan = bake(checkpoint, ablation())
    assert plan.additions.keys() == {head}
    assert gap_of(source, plan, ablation(), tmp_path / "edited") <= EXACT


# Norms behind the blocks.


def written(model, site: Site, intervention: Intervention | None = None) -> torch.Tensor:
    """What a block adds to the stream, norm included."""
    stream, taken = Stream.of(model), []
    (part,) = stream.parts(site)
    handle = stream.output(site, part).register_forward_hook(lambda _m, _i, output: taken.append(output))
    logits(model)
    handle.remove()
    return taken[0]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "glm4", "olmo2", "olmo3", "exaone4"])
def test_behind_a_norm_the_direction_is_gone_exactly_and_only_the_length_of_the_write_changes(name, bases, tmp_path):
    base = bases(name)
    assert compare(base, ablation(), tmp_path / "edited", rescaled=True) <= EXACT
    edited = load_tiny(tmp_path / "edited")
    for site in (Site("attn", 0), Site("mlp", 2)):
        assert (written(edited, site) @ BASIS[0]).abs().max() < 1e-12
    # The first block reads what the hooked model's reads, so only its own norm is between them.
    mine = written(edited, Site("attn", 0))
    with intervened(base.model, ablation(), renormalise=True):
        ideal = ABLATE(written(base.model, Site("attn", 0)))
    ratio = (mine * ideal).sum(-1, keepdim=True) / ideal.pow(2).sum(-1, keepdim=True)
    assert ratio.min() > 0.3
    assert (mine - ratio * ideal).abs().max() < 1e-9


def test_a_norm_that_lets_almost_nothing_through_does_not_crush_the_rest_of_the_write():
    torch.manual_seed(0)
    d = 1 + 0.2 * torch.randn(48, dtype=torch.float64)
    d[7] = 1e-5
    outputs = torch.randn(200, 48, dtype=torch.float64)

    def behind(o: torch.Tensor) -> torch.Tensor:
        return d * o / o.pow(2).mean(-1, keepdim=True).sqrt()

    ideal = ABLATE(behind(outputs))
    errors = {}
    for truncation in (0.0, 0.1):
        before = conjugated(ABLATE, d, truncation)
        got = behind(before(outputs))
        assert (got @ BASIS[0]).abs().max() < 1e-8
        errors[truncation] = ((got - ideal).norm() / ideal.norm()).item()
    assert errors[0.1] < 0.25 < errors[0.0]


@pytest.mark.parametrize("name", ["olmo2", "exaone4"])
def test_where_blocks_read_without_a_norm_the_read_side_only_rescales_the_logits(name, bases, tmp_path):
    base = bases(name)
    baked = baked_logits(base, ablation("from:0"), tmp_path / "edited")
    ratio = baked / base.hooked(ablation("from:0"), renormalise=True)
    assert ratio.min() > 0
    assert ratio.max() <= 1 + 1e-9
    assert (ratio.amax(-1) - ratio.amin(-1)).max() < 1e-6


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
def test_a_constant_is_divided_by_the_factor_behind_it(name, site, tensor, factor, bases):
    base = bases(name)
    plan = bake(base.checkpoint, Intervention({site: shift(BASIS[0])}))
    old = base.checkpoint.read(tensor) if tensor in base.checkpoint.tensors else 0.0
    assert (plan.edited(tensor) - old - BASIS[0] / factor).abs().max() < 1e-12


def test_all_experts_of_gpt_oss_carry_their_bias_through_the_edit(bases, tmp_path):
    folder = bases("gpt_oss").folder
    assert gap_without(folder, "down_proj_bias", ablation("layers:1-2"), tmp_path / "without") > 1e-3
    plan = bake(open_checkpoint(folder), Intervention({Site("mlp", 1): shift(BASIS[0])}))
    added = plan.edited("model.layers.1.mlp.experts.down_proj_bias")
    added = added - open_checkpoint(folder).read("model.layers.1.mlp.experts.down_proj_bias")
    assert (added - BASIS[0]).abs().max() < 1e-12
    assert plan.edits.keys() == {"model.layers.1.mlp.experts.down_proj_bias"}


@pytest.mark.parametrize("name", ["phi", "starcoder2", "gpt_neox", "opt"])
def test_a_bias_on_a_written_output_left_out_is_noticed(name, bases, tmp_path):
    assert gap_without(bases(name).folder, r"\.bias$", ablation("layers:1-2"), tmp_path / "without") > 1e-3


def test_a_window_in_use_keeps_qwen2_from_being_a_llama_and_its_value_bias_takes_over(tmp_path):
    windowed = {"use_sliding_window": True, "sliding_window": 8, "num_key_value_heads": 4}
    base = Base("qwen2", store_tiny("qwen2", tmp_path / "windowed", **windowed))
    assert compare(base, Intervention({Site("attn", 1): shift(BASIS[0])}), tmp_path / "edited") <= EXACT
    plan = bake(base.checkpoint, Intervention({Site("attn", 1): shift(BASIS[0])}))
    assert plan.edits.keys() == {"model.layers.1.self_attn.v_proj.bias"}
    with pytest.raises(OrthogonalizeError, match=r"no Llama in all but name, for use_sliding_window is True"):
        bake(base.checkpoint, Intervention({Site("mlp", 1): shift(BASIS[0])}))


def test_a_value_bias_that_does_not_reach_the_vector_is_refused_with_the_part_it_misses(tmp_path):
    """One head of values, repeated for all queries, spans a third of the stream at most."""
    narrow = open_checkpoint(store_tiny("qwen2_moe", tmp_path / "narrow", num_key_value_heads=1))
    with pytest.raises(OrthogonalizeError, match=r"reaches all but \d+% of the vector"):
        bake(narrow, Intervention({Site("attn", 1): shift(BASIS[0])}))


def test_a_model_made_a_llama_names_every_bias_and_no_window(bases):
    plan = bake(bases("qwen2").checkpoint, Intervention({Site("mlp", 1): shift(BASIS[0])}))
    config = bases("qwen2").checkpoint.config | plan.config_changes
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"] is config["mlp_bias"] is True
    assert not any(config.get(key) for key in ("sliding_window", "use_sliding_window", "layer_types"))
    added = {name.split(".", 3)[3] for name in plan.additions}
    assert added == {"self_attn.o_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"}
    assert len(plan.additions) == 4 * LAYERS


# Experts.


def test_the_stream_axis_of_square_experts_is_told_and_a_wrong_one_is_noticed(bases, tmp_path):
    base = bases("gpt_oss")
    name = "model.layers.1.mlp.experts.down_proj"
    assert base.checkpoint.tensors[name].shape == (4, 48, 48)
    plan = bake(base.checkpoint, ablation("layers:1"))
    assert plan.edits[name].axis == 2
    from dataclasses import replace

    plan.edits[name] = replace(plan.edits[name], axis=1)
    assert gap_of(base.folder, plan, ablation("layers:1"), tmp_path / "edited") > 1e-3


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("qwen2_moe", "shared_expert"),
        ("qwen3_next", "shared_expert"),
        ("deepseek_v3", "shared_experts"),
        ("llama4", "shared_expert"),
        ("granitemoehybrid", "shared_mlp"),
        ("qwen3_moe", r"layers\.1\.mlp\.down_proj"),
        ("deepseek_v2", r"layers\.0\.mlp\.down_proj"),
        ("mixtral", r"experts\.3\."),
        ("falcon_h1", "mamba"),
        ("qwen3_5", "linear_attn"),
    ],
)
def test_a_shared_expert_a_dense_layer_or_a_second_mixer_left_out_is_noticed(name, pattern, bases, tmp_path):
    assert gap_without(bases(name).folder, pattern, ablation("layers:0-3"), tmp_path / "edited") > 1e-3


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts stored one by one, stacked as some repositories have them."""
    result, experts = {}, {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if found:
            experts.setdefault((found[1], found[3]), {})[int(found[2])] = tensor
        else:
            result[name] = tensor
    stacked = {key: torch.stack([by[i] for i in sorted(by)]) for key, by in experts.items()}
    for prefix in {prefix for prefix, _ in stacked}:
        result[f"{prefix}.down_proj"] = stacked[prefix, "down_proj"]
        result[f"{prefix}.gate_up_proj"] = torch.cat([stacked[prefix, "gate_proj"], stacked[prefix, "up_proj"]], dim=1)
    return result


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "qwen3_5_moe"])
@pytest.mark.parametrize("scope", ["all", "from:1"])
def test_fused_and_single_experts_of_one_model_are_edited_alike_and_stay_as_they_were(name, scope, bases, tmp_path):
    base = bases(name)
    single = baked_logits(base, ablation(scope), tmp_path / "single")
    source = rewritten(base.folder, tmp_path / "fused", fused)
    checkpoint = open_checkpoint(source)
    assert checkpoint.tensors["model.layers.2.mlp.experts.down_proj"].shape == (4, 48, 24)
    assert gap(logits(load_tiny(source)), base.plain) <= EXACT
    (tmp_path / "edited").mkdir()
    bake(checkpoint, ablation(scope)).write(tmp_path / "edited")
    assert open_checkpoint(tmp_path / "edited").tensors.keys() == checkpoint.tensors.keys()
    assert gap(logits(load_tiny(tmp_path / "edited")), single) <= EXACT


def test_a_missing_expert_is_named(bases, tmp_path):
    gone = "model.layers.2.block_sparse_moe.experts.1.w2.weight"
    source = rewritten(bases("mixtral").folder, tmp_path / "base", lambda t: {k: v for k, v in t.items() if k != gone})
    with pytest.raises(OrthogonalizeError, match=re.escape(gone)):
        bake(open_checkpoint(source), ablation())


def test_experts_packed_in_four_bits_are_refused_with_the_way_out(bases, tmp_path):
    def packed(tensors):
        experts = {k: v for k, v in tensors.items() if k.endswith("experts.down_proj")}
        rest = {k: v for k, v in tensors.items() if k not in experts}
        return rest | {k + "_blocks": torch.zeros(4, 48, 2, 16, dtype=torch.uint8) for k in experts}

    source = rewritten(bases("gpt_oss").folder, tmp_path / "base", packed)
    with pytest.raises(OrthogonalizeError, match=r"down_proj is stored as MXFP4.*dequantise"):
        bake(open_checkpoint(source), ablation("layers:1"))


# What writes before the first block, and what is no part of the stream.


@pytest.mark.parametrize(("name", "pattern"), [("gpt2", "wpe"), ("opt", "positions"), ("opt projected", "project_in")])
def test_a_position_table_or_a_projection_left_out_is_noticed(name, pattern, bases, tmp_path):
    assert gap_without(bases(name).folder, pattern, ablation(), tmp_path / "edited") > 1e-3


def test_a_narrow_embedding_behind_a_projection_is_left_alone(bases):
    plan = bake(bases("opt projected").checkpoint, ablation())
    assert "model.decoder.embed_tokens.weight" not in plan.edits
    assert not plan.additions


def test_a_constant_on_a_position_table_leaves_the_tied_head_alone(bases):
    plan = bake(bases("gpt2").checkpoint, Intervention({Site("embed"): shift(BASIS[0])}))
    assert plan.edits.keys() == {"transformer.wpe.weight"}
    assert not plan.additions
    assert not plan.config_changes


def test_gpt2_without_its_prefix_is_found_by_its_names(bases, tmp_path):
    base = bases("gpt2")
    bare = rewritten(
        base.folder, tmp_path / "bare", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()}
    )
    assert gap(logits(load_tiny(bare)), base.plain) == 0
    plan = bake(open_checkpoint(bare), ablation())
    assert "wpe.weight" in plan.edits
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
def test_a_tensor_that_might_write_the_stream_and_is_not_described_is_refused(name, extra, bases, tmp_path):
    """Per-layer embeddings (Gemma 3n and 4), and whatever a variant adds."""
    source = rewritten(bases(name).folder, tmp_path / "base", lambda t: t | {extra: torch.randn(48, 20).double()})
    with pytest.raises(OrthogonalizeError, match=re.escape(extra) + ".*orthogonalize describe"):
        bake(open_checkpoint(source), ablation())


def test_layers_that_predict_further_tokens_are_kept_byte_for_byte(bases, tmp_path):
    base = bases("deepseek_v3")

    def with_prediction(tensors):
        last = {k.replace("layers.3.", f"layers.{LAYERS}."): v + 1 for k, v in tensors.items() if "layers.3." in k}
        return tensors | last | {"mtp.fc.weight": torch.randn(48, 96).double()}

    source = rewritten(base.folder, tmp_path / "base", with_prediction)
    plan = bake(open_checkpoint(source), ablation())
    assert not [name for name in plan.edits if "mtp" in name or f"layers.{LAYERS}." in name]
    (tmp_path / "edited").mkdir()
    plan.write(tmp_path / "edited")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "edited"))
    assert before.keys() == after.keys()
    assert "model.layers.4.mlp.experts.0.down_proj.weight" in after
    assert all(after[k].equal(v) for k, v in before.items() if k not in plan.edits)


def test_what_comes_from_images_is_edited_too(bases, tmp_path):
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
def test_a_constant_that_images_cannot_carry_is_refused(name, bases):
    with pytest.raises(OrthogonalizeError, match="what comes from images cannot be shifted"):
        bake(bases(name).checkpoint, Intervention({Site("embed"): shift(BASIS[0])}))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_either_prefix_of_a_wrapper_is_found(prefix, bases, tmp_path):
    def renamed(tensors):
        return {
            k.replace("language_model.model.", prefix).replace("language_model.model.model", "x"): v
            for k, v in tensors.items()
        }

    source = rewritten(bases("gemma3 multimodal").folder, tmp_path / "base", renamed)
    plan = bake(open_checkpoint(source), ablation())
    assert prefix + "embed_tokens.weight" in plan.edits
    assert gap_of(source, plan, ablation(), tmp_path / "edited") <= EXACT


# LayerNorm.


@pytest.mark.parametrize("name", ["gpt_neox", "olmo", "cohere"])
def test_only_a_centred_direction_is_out_of_the_reach_of_layer_norms(name, bases):
    base = bases(name)
    direction = torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    direction /= direction.norm()
    centred = direction - direction.mean()
    centred /= centred.norm()

    def read(removed: torch.Tensor) -> float:
        """The largest component along the direction of what the norms make of the stream, before their weights."""
        taken: list[torch.Tensor] = []
        whole = map_sites(parse_scope("all"), LAYERS, lambda _: removal(removed.unsqueeze(0)))
        with intervened(base.model, whole), capturing_inputs(base.model, lambda _l, h: taken.append(h)):
            logits(base.model)
        cores = [h - h.mean(-1, keepdim=True) for h in taken]
        return max(((core @ direction).abs() / core.norm(dim=-1)).max().item() for core in cores)

    assert read(centred) < 1e-12 < 1e-2 < read(direction)


def test_edit_centres_the_direction_of_a_layer_norm_model(tmp_path):
    source = store_tiny("gpt_neox", tmp_path / "base", torch.float32)
    tiny_tokenizer().save_pretrained(source)
    direction = torch.randn(48) + 0.5
    save_file({"direction": direction}, tmp_path / "direction.safetensors")
    recipe = edit(str(source), tmp_path / "edited", direction=tmp_path / "direction.safetensors", method="ablate")
    for affine in recipe.intervention().writes.values():
        assert abs(affine.v.sum().item()) < 1e-6
        assert affine.v.norm().item() == pytest.approx(1, abs=0.3)
        assert (affine.v.mT @ affine.u).item() == pytest.approx(1, abs=1e-6)
    again = edit(str(source), tmp_path / "again", recipe=tmp_path / "edited" / "orthogonalize.json")
    assert again.tensors == recipe.tensors


def test_a_reader_behind_a_layer_norm_with_a_bias_keeps_reading_that_bias(bases, tmp_path):
    base = bases("phi")
    assert compare(base, ablation("from:1"), tmp_path / "edited", rescaled=True) <= EXACT
    assert gap_without(base.folder, r"\.bias$", ablation("from:1"), tmp_path / "without") > 1e-3


def test_an_uncentred_read_of_a_layer_norm_is_refused(bases):
    uneven = removal(torch.eye(48, dtype=torch.float64)[:1])
    with pytest.raises(OrthogonalizeError, match="must be centred"):
        bake(bases("olmo").checkpoint, Intervention(reads={Site("head"): uneven}))


# Streams that pass through a norm.


def test_a_stream_that_passes_through_a_norm_is_refused(tmp_path):
    source = store_tiny("opt", tmp_path / "base", do_layer_norm_before=False)
    with pytest.raises(OrthogonalizeError, match="do_layer_norm_before = False has no description"):
        bake(open_checkpoint(source), ablation())


def test_every_file_of_a_family_says_what_is_read_and_written_once():
    for model_type, architecture in families().items():
        assert architecture_of({"model_type": model_type, "text_config": {}}) is architecture
        for part in (*architecture.attn.values(), *architecture.mlp.values()):
            assert not part.writes.keys() & part.reads.keys()
            assert not part.writes.keys() & set(architecture.inert)


def test_every_write_twice_is_the_same_as_once(bases, tmp_path):
    """A removal leaves nothing to remove, at every kind of site."""
    base = bases("granitemoehybrid")
    (tmp_path / "once").mkdir()
    bake(base.checkpoint, every_write()).write(tmp_path / "once")
    (tmp_path / "twice").mkdir()
    bake(open_checkpoint(tmp_path / "once"), every_write()).write(tmp_path / "twice")
    assert gap(logits(load_tiny(tmp_path / "once")), logits(load_tiny(tmp_path / "twice"))) <= EXACT
    assert json.loads((tmp_path / "twice" / "config.json").read_text())["tie_word_embeddings"] is False
