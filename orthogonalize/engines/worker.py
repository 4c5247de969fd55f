"""What vLLM's worker processes import by name: no function is sent to them.

There is one class for all engines, since vLLM adds it to a worker class for the life of the process.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..core.errors import OrthogonalizeError
from .base import Part, fingerprint

if TYPE_CHECKING:
    from .reading.stream_worker import WorkerStreams


class EngineWorker:
    """Methods added to vLLM's workers (`worker_extension_cls`); vLLM calls them by name.

    Tensors go in and out by files. What cannot be read is returned as a message, since vLLM does not tell kinds of
    errors apart.
    """

    get_model: Any  # the worker's own
    model_runner: Any
    rank: int

    def weights_fingerprint(self, part: Part) -> str:
        """SHA-256 of the weights that this worker holds (see `base.fingerprint`)."""
        return fingerprint(self.get_model(), part)

    def begin_reading(self, layers: list[int], positions: int, edits: str | None, summed: bool) -> str:
        """See `WorkerStreams.begin`; returns why it is not possible, or nothing."""
        from .reading.stream_worker import load_edits

        try:
            self._streams.begin(layers, positions, load_edits(edits), summed)
        except OrthogonalizeError as error:
            return str(error)
        return ""

    def store_streams(self, folder: str) -> tuple[Any, ...] | None:
        """See `WorkerStreams.store`."""
        stored = self._streams.store(folder, self.rank)
        return stored and tuple(stored)

    def store_logits(self, folder: str) -> None:
        """See `WorkerStreams.store_logits`."""
        self._streams.store_logits(folder)

    def store_measures(self, folder: str, behaviour: list[int], keep: bool, along: bool) -> None:
        """See `WorkerStreams.store_measures`."""
        self._streams.store_measures(folder, behaviour, keep, along)

    def forget_base(self) -> None:
        """See `OutputStore.forget_base`."""
        self._streams.outputs.forget_base()

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of this package, given as "MODULE:FUNCTION", with the worker's streams and rank."""
        module, _, name = function.partition(":")
        if not module.startswith(f"{__package__.partition('.')[0]}."):
            raise ValueError(f"{module} is not a module of this package")
        return getattr(import_module(module), name)(self._streams, self.rank, *arguments)

    def end_reading(self) -> None:
        """Remove all hooks."""
        self._streams.end()

    @property
    def _streams(self) -> WorkerStreams:
        from .reading.stream_worker import WorkerStreams

        found: WorkerStreams | None = self.__dict__.get("_worker_streams")
        if found is None:
            from vllm.distributed.parallel_state import get_tp_group

            found = WorkerStreams(self.model_runner, get_tp_group().rank_in_group == 0)
            self.__dict__["_worker_streams"] = found
        return found
