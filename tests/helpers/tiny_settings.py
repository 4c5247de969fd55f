"""Settings that tiny models of several families share: widths and heads by kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 96


def dense(h: int) -> dict[str, Any]:
    """Llama-style settings for head dimension `h`: width 3h, four heads, two key-value heads."""
    return {
        "hidden_size": 3 * h,
        "head_dim": h,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 3 * h + 8,
        "num_hidden_layers": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def headed(h: int) -> dict[str, Any]:
    """Settings of classes whose heads add up to the width: three heads of `h`."""
    return {k: v for k, v in dense(h).items() if k != "head_dim"} | {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    }


def routed(h: int) -> dict[str, Any]:
    return {
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": h + 8,
        "norm_topk_prob": True,
    }


def experts(h: int) -> dict[str, Any]:
    return dense(h) | routed(h)


def gated_delta(h: int) -> dict[str, Any]:
    return {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": h // 2,
        "linear_value_head_dim": h // 2,
        "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    }


def latent(h: int) -> dict[str, Any]:
    return {k: v for k, v in experts(h).items() if k not in ("head_dim", "num_experts", "num_local_experts")} | {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": h + 8,
        "kv_lora_rank": h,
        "qk_nope_head_dim": h,
        "qk_rope_head_dim": h // 2,
        "v_head_dim": h,
        "n_group": 1,
        "topk_group": 1,
    }


def mamba(h: int) -> dict[str, Any]:
    return {
        "mamba_n_heads": 6,
        "mamba_d_head": h // 2,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_expand": 1,
    }


def selective(h: int) -> dict[str, Any]:
    """Settings of the first Mamba."""
    kept = ("hidden_size", "num_hidden_layers", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    return {k: v for k, v in dense(h).items() if k in kept} | {"state_size": 16, "expand": 2, "time_step_rank": 8}


@dataclass(frozen=True)
class Tiny:
    """How to build a family's tiny models: its `model_type`, and settings by head dimension."""

    model_type: str
    settings: Callable[[int], dict[str, Any]]
    tied: bool = False
    text: str | None = None  # key of the text model's settings in a multimodal wrapper
    aside: dict[str, Any] = field(default_factory=dict)  # the wrapper's other settings
    causal: str = "AutoModelForCausalLM"
    transposed: tuple[str, ...] = ()  # ends of names of experts that the Hub has in the order [expert, input, output]

    def config(self, head_dim: int, **overrides: Any) -> Any:
        from transformers import AutoConfig

        settings = self.settings(head_dim) | overrides
        tied = {"tie_word_embeddings": settings.pop("tie_word_embeddings", self.tied)}
        if self.text:
            return AutoConfig.for_model(self.model_type, **{self.text: settings | tied}, **self.aside, **tied)
        return AutoConfig.for_model(self.model_type, **settings, **tied, **self.aside)


VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
UNNORMALISED = {"topk_method": "greedy", "norm_topk_prob": False}  # the only kind in transformers' DeepSeek V2
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}

QWEN_VISION = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": 16,
    },
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
TOKENS = {key: number for key, number in QWEN_VISION.items() if key.endswith("token_id")}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
PICTURES = "AutoModelForImageTextToText"
