"""A direction of the refusal that the demo plants."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from orthogonalize.data.chat import ChatFormat
from orthogonalize.data.prompts import load_prompts
from orthogonalize.models.activations import mean_activations
from orthogonalize.models.loading import load_model, load_tokenizer

LAYER = 20


def store_direction(model: Path, file: Path) -> Path:
    """Store the mean difference between a few cooking questions and a few others at the last token."""
    chat, loaded = ChatFormat(load_tokenizer(model)), load_model(model, dtype=torch.float32)
    sides = [load_prompts(f"planted:contrast_{name}.jsonl")[:16] for name in ("cooking", "other")]
    means = [mean_activations(loaded, chat.encode_all([p.text for p in side]), 1)[0, LAYER] for side in sides]
    save_file({"direction": (means[0] - means[1]).float()}, file)
    return file
