"""Open the fitted edits of a finished run: with the model whole in memory, or streamed block by block."""

from __future__ import annotations

from ...checkpoints.checkpoint import Checkpoint
from ...models.loading import FILLED, choose_device, choose_dtype, free_memory, load_model, resident_bytes
from ...models.streaming.lanes import StreamedModel
from ...models.streaming.weights import PartialModel, can_stream
from ..fits import Fits
from ..run_folder import Run
from ..stages import StageBook
from .streamed_fits import STATE, StreamedFits, streams_budget


def open_fits(run: Run, source: Checkpoint, device: str = "auto") -> Fits:
    """The fitted edits of `source` by a run; the model is opened when one of them has to be fitted.

    It is streamed if the run was made so, if `source` is not on this disk, or if it does not fit into memory.
    """
    assert run.folder is not None
    weights = source.fingerprint()
    if not _is_streamed(run, source, device):
        return Fits(run.folder, run.directions, source.config, weights, lambda: load_model(source.path, device))
    return StreamedFits(
        lambda: StreamedModel(PartialModel(source, device)), run.candidates, streams_budget(), run.folder / STATE,
        run.folder, run.directions, source.config, weights,
    )  # fmt: skip


def _is_streamed(run: Run, source: Checkpoint, device: str) -> bool:
    if not can_stream(source):
        return False
    if source.remote_sizes or _was_streamed(run):
        return True
    place = choose_device(device)
    dtype = choose_dtype(place, source.dtype)
    return resident_bytes(source, place, dtype) > FILLED * sum(free_memory(device))


def _was_streamed(run: Run) -> bool:
    """Whether the answers that edits are fitted to come from a streamed model."""
    assert run.folder is not None
    answers = StageBook(run.folder).entries.get("answers")
    return answers is not None and answers.inputs.get("engine") == "stream"
