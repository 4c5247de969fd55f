"""Which engine serves a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import ONE_DEVICE, Engine, EngineName, EngineOptions
from .data_parallel import EngineGroup
from .transformers import TransformersEngine
from .vllm import VllmEngine


def open_engine(
    name: EngineName, folder: Path, tokenizer: Any, max_model_len: int, options: EngineOptions = ONE_DEVICE
) -> Engine:
    """The engine called `name` for a checkpoint folder; use it as a context manager."""
    if name == "hf":
        return TransformersEngine(folder, tokenizer, options.device)
    if options.data_parallel_size > 1:
        return EngineGroup(folder, max_model_len, options)
    return VllmEngine(folder, max_model_len, options)
