"""The fitted edits of a run whose model is never whole in memory: several are fitted in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ...core.interventions import ConditionalMap, WriteMatrix
from ...core.memory import available_memory
from ...directions.direction_set import Directions
from ...edits.build import finder_of
from ...edits.config import EditConfig
from ...edits.fitting.fit import FitTokens, spans_of, weights_of
from ...edits.fitting.streamed import FitJob, fit_streamed, fits_at_once
from ...edits.methods.registry import METHODS
from ...models.streaming.lanes import StreamedModel
from ...models.streaming.state import StreamState
from ..candidates import Candidate, layer_ranking
from ..fits import TOKENS, Fits, load_maps

STATE = ".pass.streams.partial"  # of an interrupted pass, in the run folder
SHARE = 0.5  # of the available memory that the streams of one pass may take


def streams_budget() -> int:
    """Bytes of streams that a pass may hold."""
    return int(SHARE * available_memory())


class StreamedFits(Fits):
    """Fits conditional edits in passes over the weights; see `Fits`.

    Args:
        open_streamed: opens the model when it is first needed.
        ranked: the run's candidates, best first.
        budget: bytes of streams that a pass may hold.
        state: where a pass is kept between interruptions.
        folder, directions, config, weights: see `Fits`.
    """

    def __init__(
        self,
        open_streamed: Callable[[], StreamedModel],
        ranked: Sequence[Candidate],
        budget: int,
        state: Path,
        folder: Path,
        directions: Directions,
        config: dict[str, Any],
        weights: dict[str, str],
    ) -> None:
        super().__init__(folder, directions, config, weights, _not_whole)
        self._open, self.ranked, self.budget, self.state = open_streamed, ranked, budget, state

    @cached_property
    def streamed(self) -> StreamedModel:
        return self._open()

    def prepare(self, choices: Sequence[EditConfig]) -> None:
        """Fit and store what these edits need, in as few passes as the memory for their streams allows."""
        needed: dict[Path, FitJob] = {}
        for choice in choices:
            if METHODS[choice.method].fitted:
                ranking = layer_ranking(self.ranked, finder_of(choice.method, self.directions, choice.finder))
                needed[self._file(choice, ranking)] = self._job(choice, ranking)
        self._fit_all({file: job for file, job in needed.items() if not file.is_file()})

    def _job(self, choice: EditConfig, ranking: Sequence[int] | None) -> FitJob:
        return FitJob(
            spans_of(choice, self.directions), self._sites(choice, ranking), weights_of(choice), choice.sequential
        )

    def _fit_all(self, jobs: dict[Path, FitJob]) -> None:
        if not jobs:
            return
        tokens = FitTokens.load(self.folder / TOKENS)
        files, count = sorted(jobs), fits_at_once(self.streamed, tokens, self.budget)
        for start in range(0, len(files), count):
            portion = files[start : start + count]
            state = StreamState(self.state, [file.name for file in portion])
            fits = fit_streamed(self.streamed, tokens, {file.stem: jobs[file] for file in portion}, state)
            for file in portion:
                self._store(fits[file.stem], file)
            state.close()

    def _fit(self, choice: EditConfig, ranking: Sequence[int] | None, file: Path) -> dict[WriteMatrix, ConditionalMap]:
        self._fit_all({file: self._job(choice, ranking)})
        return load_maps(file)


def _not_whole() -> Any:
    raise AssertionError("a streamed model is never loaded whole")
