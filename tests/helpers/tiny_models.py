"""Tiny random models of every described family, stored as on the Hub.

Every weight, norm and bias is random, so that nothing passes by accident; every kind of layer of the
family is present; dimensions differ wherever the class allows it, so that a wrong axis shows.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_dense import DENSE
from helpers.tiny_experts import EXPERTS
from helpers.tiny_settings import Tiny
from helpers.tiny_wrappers import WRAPPERS
from orthogonalize.models.describe.twin import DoublePrecision, model_inputs

TINY: dict[str, Tiny] = DENSE | EXPERTS | WRAPPERS

# One of each kind: post-norms, stored transposed, parallel blocks, biases, low-rank attention, state space, hybrids,
# scaled residuals, experts (fused, single, shared), several writes a block, tied heads, wrappers.
KINDS = (
    *("llama", "gemma2", "gpt2", "gpt_neox", "opt projected", "olmo2", "granite", "cohere", "lfm2", "falcon_h1"),
    *("mamba2", "gemma4", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "mixtral", "gemma3 multimodal"),
)


def every_family(but: Collection[str] = ()) -> list[Any]:
    """Names for a test that takes seconds a family: `make test` runs it for `KINDS`, `make prove` for the others."""
    return [name if name in KINDS else pytest.param(name, marks=pytest.mark.prove) for name in TINY if name not in but]


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
    for file in folder.glob("*.safetensors") if TINY[name].transposed else ():
        stored = load_file(file)
        changed = {n: t.mT.contiguous() if n.endswith(TINY[name].transposed) else t for n, t in stored.items()}
        save_file(changed, file, {"format": "pt"})
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
        return model(**model_inputs(model, ids)).logits.double()
