"""Tiny random models of every described family, stored as on the Hub.

Every weight, norm and bias is random, so that nothing passes by accident; every kind of layer of the
family is present; dimensions differ wherever the class allows it, so that a wrong axis shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from orthogonalize.models.describe.twin import DoublePrecision

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

# fmt: off
TINY: dict[str, Tiny] = {
    "llama": Tiny("llama", dense, tied=True),
    "mistral": Tiny("mistral", lambda h: dense(h) | {"sliding_window": None}),
    "ministral3": Tiny("ministral3", dense),
    "ministral3 multimodal": Tiny(
        "mistral3", lambda h: dense(h) | {"model_type": "ministral3"}, text="text_config", causal=PICTURES,
        aside={
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 12},
            "image_token_index": 90, "spatial_merge_size": 1,
        },
    ),
    "qwen2": Tiny("qwen2", dense, tied=True),
    "qwen3": Tiny("qwen3", dense, tied=True),
    "qwen2_moe": Tiny(
        "qwen2_moe",
        lambda h: headed(h) | routed(h) | {"shared_expert_intermediate_size": 3 * h + 16, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": Tiny("qwen3_moe", lambda h: experts(h) | {"mlp_only_layers": [1]}),
    "qwen3_next": Tiny(
        "qwen3_next", lambda h: experts(h) | gated_delta(h) | {"shared_expert_intermediate_size": h + 16}
    ),
    "qwen3_5": Tiny("qwen3_5_text", lambda h: dense(h) | gated_delta(h), tied=True),
    "qwen3_5_moe": Tiny(
        "qwen3_5_moe_text", lambda h: experts(h) | gated_delta(h) | {"shared_expert_intermediate_size": h + 16}
    ),
    "qwen3_5 multimodal": Tiny(
        "qwen3_5", lambda h: dense(h) | gated_delta(h), tied=True, text="text_config", aside=QWEN_VISION,
        causal=PICTURES,
    ),
    "qwen3_5_moe multimodal": Tiny(
        "qwen3_5_moe", lambda h: experts(h) | gated_delta(h) | {"shared_expert_intermediate_size": h + 16},
        text="text_config", aside=QWEN_VISION, causal=PICTURES,
    ),
    "gemma": Tiny("gemma", dense, tied=True),
    "gemma2": Tiny("gemma2", lambda h: dense(h) | WINDOWED | {"query_pre_attn_scalar": h}, tied=True),
    "gemma3": Tiny("gemma3_text", lambda h: dense(h) | WINDOWED | {"query_pre_attn_scalar": h}, tied=True),
    "gemma3 multimodal": Tiny(
        "gemma3",
        lambda h: dense(h) | WINDOWED | {"query_pre_attn_scalar": h},
        tied=True,
        text="text_config",
        aside={
            "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
    ),
    "phi": Tiny("phi", headed),
    "phi3": Tiny("phi3", headed),
    "gpt2": Tiny(
        "gpt2",
        lambda h: {
            "n_embd": 3 * h, "n_head": 3, "n_layer": 4, "vocab_size": VOCABULARY, "n_positions": 128,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
        tied=True,
    ),
    "gpt_neox": Tiny("gpt_neox", headed),
    "opt": Tiny(
        "opt", lambda h: headed(h) | {"ffn_dim": 3 * h + 8, "word_embed_proj_dim": 3 * h}, tied=True
    ),
    "opt projected": Tiny(
        "opt", lambda h: headed(h) | {"ffn_dim": 3 * h + 8, "word_embed_proj_dim": 2 * h}, tied=True
    ),
    "olmo": Tiny("olmo", headed),
    "olmo2": Tiny("olmo2", headed),
    "olmo3": Tiny("olmo3", lambda h: headed(h) | WINDOWED),
    "granite": Tiny(
        "granite",
        lambda h: headed(h)
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2, "logits_scaling": 2.0},
        tied=True,
    ),
    "granitemoe": Tiny(
        "granitemoe",
        lambda h: headed(h)
        | {
            "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2,
            "logits_scaling": 2.0, "num_local_experts": 4, "num_experts_per_tok": 2,
        },
        tied=True,
    ),
    "granitemoehybrid": Tiny(
        "granitemoehybrid",
        lambda h: headed(h) | mamba(h)
        | {
            "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2,
            "logits_scaling": 2.0, "num_local_experts": 4, "num_experts_per_tok": 2,
            "shared_intermediate_size": 3 * h + 16, "layer_types": ["mamba", "attention"] * 2,
        },
        tied=True,
    ),
    "cohere": Tiny("cohere", lambda h: headed(h) | {"logit_scale": 0.5}, tied=True),
    "cohere2": Tiny("cohere2", lambda h: dense(h) | WINDOWED | {"logit_scale": 0.5}, tied=True),
    "glm4": Tiny("glm4", dense),
    "stablelm": Tiny("stablelm", lambda h: headed(h) | {"use_qkv_bias": True}),
    "stablelm parallel": Tiny("stablelm", lambda h: headed(h) | {"use_parallel_residual": True}),
    "starcoder2": Tiny("starcoder2", headed, tied=True),
    "smollm3": Tiny("smollm3", dense, tied=True),
    "exaone4": Tiny("exaone4", lambda h: dense(h) | WINDOWED, tied=True),
    "mixtral": Tiny("mixtral", experts),
    "deepseek_v2": Tiny("deepseek_v2", lambda h: latent(h) | UNNORMALISED),
    "deepseek_v2 lite": Tiny("deepseek_v2", lambda h: latent(h) | UNNORMALISED | {"q_lora_rank": None}),
    "deepseek_v3": Tiny("deepseek_v3", latent),
    "gpt_oss": Tiny(
        "gpt_oss", lambda h: experts(h) | {"intermediate_size": 3 * h, "layer_types": WINDOWED["layer_types"]}
    ),
    "llama4": Tiny(
        "llama4_text",
        lambda h: experts(h)
        | {
            "intermediate_size": h + 8, "intermediate_size_mlp": 3 * h + 16, "moe_layers": [1, 3],
            "interleave_moe_layer_step": 2, "num_experts_per_tok": 1, "attention_chunk_size": 128,
        },
    ),
    "llama4 multimodal": Tiny(
        "llama4",
        lambda h: experts(h)
        | {
            "intermediate_size": h + 8, "intermediate_size_mlp": 3 * h + 16, "moe_layers": [1, 3],
            "interleave_moe_layer_step": 2, "num_experts_per_tok": 1, "attention_chunk_size": 128,
        },
        text="text_config", causal=PICTURES,
        aside={"vision_config": VISION | {
            "vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24,
            "pixel_shuffle_ratio": 0.5, "intermediate_size": 96,
        }},
    ),
    "lfm2": Tiny(
        "lfm2",
        lambda h: headed(h)
        | {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
        tied=True,
    ),
    "falcon_h1": Tiny(
        "falcon_h1",
        lambda h: dense(h) | mamba(h)
        | {
            "embedding_multiplier": 3.0, "attention_out_multiplier": 0.7, "ssm_out_multiplier": 1.3,
            "mlp_multipliers": [0.9, 0.6], "lm_head_multiplier": 0.5, "mamba_d_ssm": 3 * h, "mamba_chunk_size": 16,
        },
    ),
    "mamba2": Tiny(
        "mamba2",
        lambda h: {
            "hidden_size": 3 * h, "num_heads": 6, "head_dim": h, "state_size": 16, "n_groups": 1, "expand": 2,
            "num_hidden_layers": 4, "vocab_size": VOCABULARY, "chunk_size": 16, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0,
        },
    ),
    "seed_oss": Tiny("seed_oss", dense),
    "hunyuan_v1_dense": Tiny("hunyuan_v1_dense", dense),
    "ernie4_5": Tiny("ernie4_5", dense, tied=True),
    "arcee": Tiny("arcee", dense),
    "apertus": Tiny("apertus", headed),
    "glm": Tiny("glm", dense),
    "nemotron": Tiny("nemotron", headed),
    "olmoe": Tiny("olmoe", lambda h: headed(h) | routed(h)),
    "phimoe": Tiny("phimoe", lambda h: headed(h) | routed(h) | {"attention_bias": True, "lm_head_bias": True}),
    "minimax_m2": Tiny("minimax_m2", lambda h: experts(h) | {"rotary_dim": h // 2}),
    "glm4_moe": Tiny(
        "glm4_moe", lambda h: experts(h) | {k: v for k, v in latent(h).items() if k.startswith(("n_", "first", "topk"))}
    ),
    "exaone_moe": Tiny(
        "exaone_moe", lambda h: experts(h) | {"num_shared_experts": 1, "first_k_dense_replace": 1} | WINDOWED
    ),
    "ernie4_5_moe": Tiny(
        "ernie4_5_moe",
        lambda h: headed(h)
        | {
            "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": h + 8, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        tied=True,
    ),
    "glm4_moe_lite": Tiny("glm4_moe_lite", latent),
    "falcon": Tiny("falcon", lambda h: headed(h) | {"num_kv_heads": 3}, tied=True),
    "falcon two norms": Tiny(
        "falcon", lambda h: headed(h) | {"new_decoder_architecture": True, "num_kv_heads": 3}, tied=True
    ),
    "mamba": Tiny("mamba", selective, tied=True),
    "falcon_mamba": Tiny("falcon_mamba", selective, tied=True),
    "jamba": Tiny(
        "jamba",
        lambda h: headed(h) | routed(h)
        | {
            "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0,
            "mamba_d_state": 16, "mamba_dt_rank": 8, "mamba_expand": 2, "use_mamba_kernels": False,
        },
    ),
    "lfm2_moe": Tiny(
        "lfm2_moe",
        lambda h: headed(h) | routed(h)
        | {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "num_dense_layers": 1},
        tied=True,
    ),
    "hunyuan_v1_moe": Tiny("hunyuan_v1_moe", lambda h: experts(h) | {"moe_topk": 2}),
    "nemotron_h": Tiny(
        "nemotron_h",
        lambda h: {k: v for k, v in experts(h).items() if k != "num_hidden_layers"}
        | {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_routed_experts": 4,
            "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "mamba_num_heads": 6, "mamba_head_dim": h,
            "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16, "moe_shared_expert_intermediate_size": h + 16,
        },
    ),
    "kimi_linear": Tiny(
        "kimi_linear",
        lambda h: latent(h)
        | {
            "num_experts": 4, "num_shared_experts": 1, "linear_head_dim": h, "linear_num_heads": 2, "q_lora_rank": None,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "mistral4": Tiny("mistral4", latent, causal=PICTURES),
    "gemma4": Tiny(
        "gemma4_text",
        lambda h: dense(h) | WINDOWED
        | {
            "global_head_dim": h, "hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 2,
        },
        tied=True,
    ),
    "gemma4 experts": Tiny(
        "gemma4_text",
        lambda h: experts(h) | WINDOWED
        | {
            "global_head_dim": h, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "top_k_experts": 2,
        },
        tied=True,
    ),
    "qwen2_vl multimodal": Tiny(
        "qwen2_vl", lambda h: headed(h) | SECTIONS, tied=True, text="text_config", causal=PICTURES,
        aside=TOKENS
        | {"vision_config": {
            "depth": 1, "embed_dim": 24, "hidden_size": 48, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        }},
    ),
    "qwen2_5_vl multimodal": Tiny(
        "qwen2_5_vl", lambda h: headed(h) | SECTIONS, text="text_config", causal=PICTURES,
        aside=TOKENS
        | {"vision_config": QWEN_VISION["vision_config"] | {"window_size": 16, "fullatt_block_indexes": [0]}},
    ),
    "qwen3_vl multimodal": Tiny(
        "qwen3_vl", lambda h: dense(h) | SECTIONS, tied=True, text="text_config", causal=PICTURES,
        aside=TOKENS
        | {"vision_config": QWEN_VISION["vision_config"] | {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]}},
    ),
}
# fmt: on


def randomise(model: Any, seed: int) -> None:
    """Randomise every parameter: norm weights around their neutral value, everything else around 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.copy_(parameter + 0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # of Gemma 4, which multiplies the stream
                buffer.fill_(0.8)


def build(name: str, head_dim: int = 16, seed: int = 0, **overrides: Any) -> Any:
    """Build the tiny model `name`, float64, in evaluation mode."""
    import transformers

    tiny = TINY[name]
    torch.manual_seed(seed)
    config = tiny.config(head_dim, **overrides)
    config._experts_implementation = "eager"
    model = getattr(transformers, tiny.causal).from_config(config, attn_implementation="eager").double().eval()
    randomise(model, seed)
    return model


def store_tiny(
    name: str,
    folder: Path,
    dtype: torch.dtype = torch.float64,
    head_dim: int = 16,
    seed: int = 0,
    spread: float = 1.0,
    **overrides: Any,
) -> Path:
    """Store the tiny model `name` as on the Hub: several shards, with the Hub's layout of experts and heads.

    `spread` scales the head, and so all logits (and the embedding, where that is the head).
    """
    model = build(name, head_dim, seed, **overrides).to(dtype)
    model.get_output_embeddings().weight.data.mul_(spread)
    model.config._experts_implementation = None
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def load_tiny(folder: Path) -> Any:
    """Load a checkpoint folder as a transformers model that computes in float64 throughout."""
    from orthogonalize.models.loading import model_class

    model = model_class(folder).from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    return model.double().eval()  # some classes keep a router in float32


def logits(model: Any, seed: int = 0) -> torch.Tensor:
    """Logits on random token ids, in float64."""
    ids = torch.randint(3, 90, (3, 17), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode(), DoublePrecision():
        return model(input_ids=ids, use_cache=False).logits.double()
