"""Tiny models of families with routed experts, in some or all layers."""

from __future__ import annotations

from helpers.tiny_settings import (
    PICTURES,
    UNNORMALISED,
    WINDOWED,
    Tiny,
    experts,
    gated_delta,
    headed,
    latent,
    mamba,
    routed,
)

# fmt: off
EXPERTS: dict[str, Tiny] = {
    "qwen2_moe": Tiny(
        "qwen2_moe",
        lambda h: headed(h) | routed(h) | {"shared_expert_intermediate_size": 3 * h + 16, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": Tiny("qwen3_moe", lambda h: experts(h) | {"mlp_only_layers": [1]}),
    "qwen3_next": Tiny(
        "qwen3_next", lambda h: experts(h) | gated_delta(h) | {"shared_expert_intermediate_size": h + 16}
    ),
    "qwen3_5_moe": Tiny(
        "qwen3_5_moe_text", lambda h: experts(h) | gated_delta(h) | {"shared_expert_intermediate_size": h + 16}
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
    "deepseek_v2": Tiny("deepseek_v2", lambda h: latent(h) | UNNORMALISED),
    "deepseek_v2 lite": Tiny("deepseek_v2", lambda h: latent(h) | UNNORMALISED | {"q_lora_rank": None}),
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
    "gemma4 experts": Tiny(
        "gemma4_text",
        lambda h: experts(h) | WINDOWED
        | {
            "global_head_dim": h, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "top_k_experts": 2,
        },
        tied=True,
    ),
    "mixtral": Tiny("mixtral", experts),
    "deepseek_v3": Tiny("deepseek_v3", latent),
    "deepseek_v32": Tiny(
        "deepseek_v32", lambda h: latent(h) | {"index_n_heads": 8, "index_head_dim": h, "index_topk": 4}
    ),
    "mistral4": Tiny("mistral4", latent, causal=PICTURES),
}
# fmt: on
