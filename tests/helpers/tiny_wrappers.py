"""Tiny models of families that also see: a text model wrapped for images."""

from __future__ import annotations

from helpers.tiny_settings import (
    PICTURES,
    QWEN_VISION,
    SECTIONS,
    TOKENS,
    VISION,
    WINDOWED,
    Tiny,
    dense,
    experts,
    gated_delta,
    headed,
)

# fmt: off
WRAPPERS: dict[str, Tiny] = {
    "ministral3 multimodal": Tiny(
        "mistral3", lambda h: dense(h) | {"model_type": "ministral3"}, text="text_config", causal=PICTURES,
        aside={
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 12},
            "image_token_index": 90, "spatial_merge_size": 1,
        },
    ),
    "qwen3_5 multimodal": Tiny(
        "qwen3_5", lambda h: dense(h) | gated_delta(h), tied=True, text="text_config", aside=QWEN_VISION,
        causal=PICTURES,
    ),
    "qwen3_5_moe multimodal": Tiny(
        "qwen3_5_moe", lambda h: experts(h) | gated_delta(h) | {"shared_expert_intermediate_size": h + 16},
        text="text_config", aside=QWEN_VISION, causal=PICTURES,
    ),
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
    "qwen3_vl_moe multimodal": Tiny(
        "qwen3_vl_moe",
        lambda h: experts(h) | SECTIONS | {"mlp_only_layers": [1], "moe_intermediate_size": h + 4},
        text="text_config", causal=PICTURES,
        transposed=("experts.gate_up_proj", "experts.down_proj"),
        aside=TOKENS
        | {"vision_config": QWEN_VISION["vision_config"] | {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]}},
    ),
    "qwen3_omni_moe_thinker multimodal": Tiny(
        "qwen3_omni_moe_thinker", lambda h: experts(h) | SECTIONS | {"mlp_only_layers": [1]}, text="text_config",
        causal=PICTURES,
        aside=TOKENS
        | {
            "vision_config": QWEN_VISION["vision_config"] | {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]},
            "audio_config": {
                "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                "d_model": 24, "output_dim": 48, "n_window": 4, "n_window_infer": 8, "downsample_hidden_size": 8,
            },
            "audio_token_id": 94,
        },
    ),
    "glm4v multimodal": Tiny(
        "glm4v", lambda h: headed(h) | SECTIONS, text="text_config", causal=PICTURES,
        aside={
            "vision_config": VISION | {
                "depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "out_hidden_size": 3 * 16,
            },
            "image_token_id": 90, "video_token_id": 91,
        },
    ),
    "mllama multimodal": Tiny(
        "mllama",
        lambda h: {k: v for k, v in dense(h).items() if k != "head_dim"}
        | {"cross_attention_layers": [1], "num_attention_heads": 3, "num_key_value_heads": 3},
        text="text_config", causal=PICTURES,
        aside={
            "vision_config": {k: v for k, v in VISION.items() if k != "num_attention_heads"}
            | {"attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 48}
            | {"intermediate_layers_indices": [0]},
            "image_token_index": 90,
        },
    ),
    "llava multimodal": Tiny(
        "llava", lambda h: dense(h) | {"model_type": "llama"}, text="text_config", causal=PICTURES,
        aside={
            "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 24},
            "image_token_index": 90,
        },
    ),
    "smolvlm multimodal": Tiny(
        "smolvlm", lambda h: dense(h) | {"model_type": "llama"}, tied=True, text="text_config", causal=PICTURES,
        aside={"vision_config": VISION, "image_token_id": 90, "scale_factor": 2, "pad_token_id": 0},
    ),
}
# fmt: on
