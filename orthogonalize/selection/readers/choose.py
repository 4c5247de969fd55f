"""Choose how `extract` holds the model: whole on one device, in a vLLM engine, or streamed block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...architectures.schema import text_config
from ...core.progress import note
from ...data.chat import ChatFormat
from ...engines.base import ONE_DEVICE
from ...engines.registry import check_engine
from ...models.loading import FILLED, choose_device, choose_dtype, free_memory, is_spread, load_model, resident_bytes
from ...models.streaming.weights import can_stream
from ..settings import Settings
from ..source import RunSource
from .base import Reader, ResidentReader
from .given_answers import read_answers
from .served.reader import ServedReader
from .streamed import StreamedReader


def choose_engine(source: RunSource, settings: Settings) -> tuple[Settings, str]:
    """The settings with the engine to use (`hf`, `vllm` or `stream`), and why."""
    if settings.engine != "auto":
        return settings, "as asked"
    if settings.engine_options != ONE_DEVICE:
        return replace(settings, engine="vllm"), "since options of vLLM are given"
    config = source.checkpoint.config
    if source.checkpoint.remote_sizes:
        return replace(settings, engine="stream"), "since the model is not on this disk"
    if not can_stream(source.checkpoint) or (config.get("auto_map") and settings.trust_remote_code):
        why = "since only that runs models of this type or format, and code from the model's repository"
        return replace(settings, engine="hf"), why
    device = choose_device(settings.device)
    dtype = settings.dtype or choose_dtype(device, source.checkpoint.dtype)
    needed = resident_bytes(source.checkpoint, device, dtype)
    free = free_memory(settings.device)
    spread = is_spread(settings.device, needed)
    sizes = _sizes(needed, dtype, free[0])
    if not spread and needed <= FILLED * free[0]:
        return replace(settings, engine="hf"), f"since the model fits into the memory of {device} ({sizes})"
    unlike = f"the model does not fit into the memory of {device} ({sizes})"
    gpus = gpus_needed(needed, free, config) if settings.device == "auto" and find_spec("vllm") else None
    if gpus is not None:
        options = replace(settings.engine_options, tensor_parallel_size=gpus)
        return replace(settings, engine="vllm", engine_options=options), f"since {unlike}, but into that of {gpus} GPUs"
    if spread and needed <= FILLED * sum(free):
        sizes = _sizes(needed, dtype, sum(free))
        return replace(settings, engine="hf"), f"since the model fits into the memory of all GPUs ({sizes})"
    return replace(settings, engine="stream"), f"since {unlike}"


def _sizes(needed: int, dtype: torch.dtype, free: int) -> str:
    return f"{needed / 1e9:.1f} GB of weights in {str(dtype).removeprefix('torch.')}, {free / 1e9:.1f} GB free"


def gpus_needed(size: int, free: Sequence[int], config: Mapping[str, Any]) -> int | None:
    """The fewest GPUs, a power of two above 1, over which vLLM can split weights of `size` bytes.

    `free` are the free bytes of each GPU; None if these are too few, or the model cannot be split so.
    """
    heads = int(text_config(config).get("num_attention_heads") or 0)
    for power in range(1, len(free).bit_length()):
        count = 1 << power
        share = FILLED * ONE_DEVICE.gpu_memory_utilization * min(free[:count])
        if size <= count * share and heads % count == 0:
            return count
    return None


def open_reader(
    source: RunSource,
    settings: Settings,
    chat: ChatFormat,
    places: tuple[int, int],
    out: Path,
    weights: dict[str, str],
) -> Reader:
    """The reader that uses the engine of `settings`; `places` are the numbers of positions and of streams to store."""
    positions, layers, engine = *places, settings.engine
    if engine == "stream":
        if settings.own_answers is None and settings.trials:
            note(
                "streaming the model: it generates nothing, so edits are fitted and tried along the first token of its "
                "answers (give whole ones with --own-answers), and are not confirmed by answers"
            )
        if source.checkpoint.remote_sizes:
            size = sum(source.checkpoint.remote_sizes) / 1e9
            note(f"{source.name} is not on this disk: every pass over its weights reads {size:.1f} GB from the Hub")
        answers = {} if settings.own_answers is None else read_answers(Path(settings.own_answers), chat)
        return StreamedReader(source.checkpoint, weights, settings, chat.tokenizer, positions, out, answers)
    if engine == "vllm":
        check_engine(engine, settings.engine_options)
        return ServedReader(source.checkpoint, weights, settings, positions, out)
    load = partial(load_model, source.folder, settings.device, settings.dtype, settings.trust_remote_code)
    return ResidentReader(load, chat.tokenizer, positions, layers, out, source.checkpoint, weights)
