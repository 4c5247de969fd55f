"""Experts: fused, one by one, shared, square and packed."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.exactness import (
    EXACT,
    ablation,
    baked_logits,
    gap,
    gap_of,
    gap_without,
    rewritten,
)
from helpers.tiny_models import load_tiny, logits

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.edits.bake import bake

pytestmark = pytest.mark.usefixtures("one_thread")


def test_stream_axis_of_square_experts_is_right(bases, tmp_path):
    """And the wrong axis is noticed."""
    base = bases("gpt_oss")
    name = "model.layers.1.mlp.experts.down_proj"
    assert base.checkpoint.tensors[name].shape == (4, 48, 48)
    plan = bake(base.checkpoint, ablation("layers:1"))
    assert plan.checkpoint.edits[name].axis == 2
    from dataclasses import replace

    plan.checkpoint.edits[name] = replace(plan.checkpoint.edits[name], axis=1)
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
def test_omitted_expert_dense_layer_or_mixer_is_noticed(name, pattern, bases, tmp_path):
    assert gap_without(bases(name).folder, pattern, ablation("layers:0-3"), tmp_path / "edited") > 1e-3


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack experts that are stored one by one, as some repositories do."""
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


FUSED = ["qwen2_moe", "qwen3_moe", "qwen3_5_moe", "qwen3_next", "deepseek_v2", "deepseek_v3"]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("scope", ["all", "from:1"])
def test_fused_and_single_experts_are_edited_alike(name, scope, bases, tmp_path):
    """And are stored as they were."""
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


def test_missing_expert_is_named(bases, tmp_path):
    gone = "model.layers.2.block_sparse_moe.experts.1.w2.weight"
    source = rewritten(bases("mixtral").folder, tmp_path / "base", lambda t: {k: v for k, v in t.items() if k != gone})
    with pytest.raises(OrthogonalizeError, match=re.escape(gone)):
        bake(open_checkpoint(source), ablation())


def test_experts_packed_in_four_bits_are_refused_with_advice(bases, tmp_path):
    def packed(tensors):
        experts = {k: v for k, v in tensors.items() if k.endswith("experts.down_proj")}
        rest = {k: v for k, v in tensors.items() if k not in experts}
        return rest | {k + "_blocks": torch.zeros(4, 48, 2, 16, dtype=torch.uint8) for k in experts}

    source = rewritten(bases("gpt_oss").folder, tmp_path / "base", packed)
    with pytest.raises(OrthogonalizeError, match=r"down_proj is stored as MXFP4.*dequantise"):
        bake(open_checkpoint(source), ablation("layers:1"))
