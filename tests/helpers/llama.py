"""Tiny random Llamas, stored on disk as on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from .tiny_models import DoublePrecision

WIDTH, LAYERS, VOCABULARY = 32, 4, 96


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A float64 Llama with every parameter random, so that nothing passes by accident."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.4 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def store(model: LlamaForCausalLM, folder: Path, dtype: torch.dtype = torch.float64, shards: int = 1) -> Path:
    """Write `model` as a checkpoint folder of one or several shards, with a few side files."""
    folder.mkdir(parents=True)
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: t.detach().to(dtype).contiguous() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for number in range(shards):
            name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(tensors.items())[number::shards])
            save_file(part, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "generation_config.json").write_text('{"eos_token_id":  2}\n')
    (folder / "LICENSE").write_bytes(b"some licence\r\n")
    (folder / "README.md").write_text("claims of the base model")
    return folder


def in_double(model):
    """Make a float64 model compute in float64 throughout; transformers does some steps in float32."""
    forward = model.forward

    def wide(*args, **kwargs):
        with DoublePrecision():
            return forward(*args, **kwargs)

    model.forward = wide
    return model


def load(folder: Path):
    """Load a checkpoint folder as a float64 transformers model."""
    return in_double(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())


def logits(model, seed: int = 0) -> torch.Tensor:
    """Logits on random token ids, in float64."""
    ids = torch.randint(3, model.config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return model(input_ids=ids).logits.double()
