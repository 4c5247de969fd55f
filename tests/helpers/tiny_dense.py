"""Tiny models of families without experts."""

from __future__ import annotations

from helpers.tiny_settings import VOCABULARY, WINDOWED, Tiny, dense, gated_delta, headed, mamba, selective

# fmt: off
DENSE: dict[str, Tiny] = {
    "llama": Tiny("llama", dense, tied=True),
    "mistral": Tiny("mistral", lambda h: dense(h) | {"sliding_window": None}),
    "ministral3": Tiny("ministral3", dense),
    "qwen2": Tiny("qwen2", dense, tied=True),
    "qwen3": Tiny("qwen3", dense, tied=True),
    "qwen3_5": Tiny("qwen3_5_text", lambda h: dense(h) | gated_delta(h), tied=True),
    "gemma": Tiny("gemma", dense, tied=True),
    "gemma2": Tiny("gemma2", lambda h: dense(h) | WINDOWED | {"query_pre_attn_scalar": h}, tied=True),
    "gemma3": Tiny("gemma3_text", lambda h: dense(h) | WINDOWED | {"query_pre_attn_scalar": h}, tied=True),
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
    "cohere": Tiny("cohere", lambda h: headed(h) | {"logit_scale": 0.5}, tied=True),
    "cohere2": Tiny("cohere2", lambda h: dense(h) | WINDOWED | {"logit_scale": 0.5}, tied=True),
    "glm4": Tiny("glm4", dense),
    "stablelm": Tiny("stablelm", lambda h: headed(h) | {"use_qkv_bias": True}),
    "stablelm parallel": Tiny("stablelm", lambda h: headed(h) | {"use_parallel_residual": True}),
    "starcoder2": Tiny("starcoder2", headed, tied=True),
    "smollm3": Tiny("smollm3", dense, tied=True),
    "exaone4": Tiny("exaone4", lambda h: dense(h) | WINDOWED, tied=True),
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
    "gemma3n": Tiny(
        "gemma3n_text",
        lambda h: dense(h) | WINDOWED
        | {
            "hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 12,
            "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
        tied=True,
    ),
    "bamba": Tiny(
        "bamba", lambda h: headed(h) | mamba(h) | {"attn_layer_indices": [1, 3], "mamba_chunk_size": 16}
    ),
    "seed_oss": Tiny("seed_oss", dense),
    "hunyuan_v1_dense": Tiny("hunyuan_v1_dense", dense),
    "ernie4_5": Tiny("ernie4_5", dense, tied=True),
    "arcee": Tiny("arcee", dense),
    "apertus": Tiny("apertus", headed),
    "glm": Tiny("glm", dense),
    "nemotron": Tiny("nemotron", headed),
    "falcon": Tiny("falcon", lambda h: headed(h) | {"num_kv_heads": 3}, tied=True),
    "falcon two norms": Tiny(
        "falcon", lambda h: headed(h) | {"new_decoder_architecture": True, "num_kv_heads": 3}, tied=True
    ),
    "mamba": Tiny("mamba", selective, tied=True),
    "falcon_mamba": Tiny("falcon_mamba", selective, tied=True),
    "gemma4": Tiny(
        "gemma4_text",
        lambda h: dense(h) | WINDOWED
        | {
            "global_head_dim": h, "hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 2,
        },
        tied=True,
    ),
}
# fmt: on
