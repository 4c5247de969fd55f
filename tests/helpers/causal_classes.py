"""The decoder-only causal language models of the installed transformers, and what is left out of them and why."""

from __future__ import annotations

from typing import Any

LEFT_OUT: dict[str, str] = {
    "encoders with a language model's head": """bert bert-generation big_bird camembert data2vec-text electra ernie
        megatron-bert rembert roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet
        xmod""",
    "decoders of encoder-decoders": """bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart
        prophetnet trocr""",
    "audio": "moshi musicgen musicgen_melody phi4_multimodal whisper",
    "captioning of images": "git",
    "bytes that an encoder makes patches of and a decoder makes bytes of again, each with a stream of its own": "blt",
    "drafters for speculative decoding": "gemma4_assistant gemma4_unified_assistant",
}

# Settings without which a class cannot be built, since their defaults do not fit each other or leave them out.
SETTINGS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [22, 22, 20]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "hunyuan_v1_moe": {"num_experts": 4, "head_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "reformer": {"is_decoder": True},
}


def decoder_only() -> list[str]:
    """The model types, one for each class of text model."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    left_out = {name for names in LEFT_OUT.values() for name in names.split()}
    found: dict[Any, str] = {}
    for model_type in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - left_out):
        config = CONFIG_MAPPING[model_type]
        text = config.sub_configs.get("text_config", config)
        found[text] = model_type  # the text model's own type sorts after its wrapper's
    return sorted(found.values())
