"""Choose how `extract` holds the model: whole, or streamed block by block."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ...core.progress import note
from ...data.chat import ChatFormat
from ...models.loading import FILLED, choose_device, choose_dtype, free_memory, is_spread, load_model, resident_bytes
from ...models.streaming.weights import can_stream
from ..settings import Settings
from ..source import RunSource
from .base import Reader, ResidentReader
from .given_answers import read_answers
from .streamed import StreamedReader


def choose_engine(source: RunSource, settings: Settings) -> tuple[str, str]:
    """The engine to use (`hf` or `stream`), and why."""
    if settings.engine != "auto":
        return settings.engine, "as asked"
    config = source.checkpoint.config
    if source.checkpoint.remote_sizes:
        return "stream", "since the model is not on this disk"
    if not can_stream(source.checkpoint) or (config.get("auto_map") and settings.trust_remote_code):
        return "hf", "since only that runs models quantized in this format and code from the model's repository"
    device = choose_device(settings.device)
    dtype = settings.dtype or choose_dtype(device, source.checkpoint.dtype)
    needed = resident_bytes(source.checkpoint, device, dtype)
    spread = is_spread(settings.device, needed)
    free = sum(free_memory(settings.device)) if spread else free_memory(settings.device)[0]
    place = "all GPUs" if spread else str(device)
    sizes = f"{needed / 1e9:.1f} GB of weights in {str(dtype).removeprefix('torch.')}, {free / 1e9:.1f} GB free"
    if needed <= FILLED * free:
        return "hf", f"since the model fits into the memory of {place} ({sizes})"
    return "stream", f"since the model does not fit into the memory of {place} ({sizes})"


def open_reader(
    engine: str,
    source: RunSource,
    settings: Settings,
    chat: ChatFormat,
    places: tuple[int, int],
    out: Path,
    weights: dict[str, str],
) -> Reader:
    """The reader that uses `engine`; `places` are the numbers of positions and of streams to store."""
    positions, layers = places
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
    load = partial(load_model, source.folder, settings.device, settings.dtype, settings.trust_remote_code)
    return ResidentReader(load, chat.tokenizer, positions, layers, out, source.checkpoint, weights)
