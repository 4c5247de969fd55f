"""The fitted edits of a run whose model is never whole in memory: several are fitted in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.interventions import ConditionalMap, WriteMatrix
from ...directions.direction_set import Directions
from ...edits.build import finder_of
from ...edits.config import EditConfig
from ...edits.fitting.fit import FitTokens, spans_of, weights_of
from ...edits.fitting.streamed import FitJob, fit_streamed
from ...edits.methods.registry import METHODS
from ...models.streaming.lanes import StreamedModel
from ...models.streaming.state import StreamState
from ..candidates import Candidate, layer_ranking
from ..fits import TOKENS, Fits, load_maps


class StreamedFits(Fits):
    """Fits conditional edits in passes over the weights; see `Fits`.

    Args:
        streamed: the model.
        ranked: the run's candidates, best first.
        state: where a pass is kept between interruptions.
        folder, directions, weights: see `Fits`.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        ranked: Sequence[Candidate],
        state: Path,
        folder: Path,
        directions: Directions,
        weights: dict[str, str],
    ) -> None:
        super().__init__(folder, directions, dict(streamed.stream.config), weights, _not_whole)
        self.streamed, self.ranked, self.state = streamed, ranked, state

    def prepare(self, choices: Sequence[EditConfig]) -> None:
        """Fit and store what these edits need, in one pass."""
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
        state = StreamState(self.state, sorted(file.name for file in jobs))
        tokens = FitTokens.load(self.folder / TOKENS)
        fits = fit_streamed(self.streamed, tokens, {file.stem: job for file, job in jobs.items()}, state)
        for file in jobs:
            self._store(fits[file.stem], file)
        state.close()

    def _fit(self, choice: EditConfig, ranking: Sequence[int] | None, file: Path) -> dict[WriteMatrix, ConditionalMap]:
        self._fit_all({file: self._job(choice, ranking)})
        return load_maps(file)


def _not_whole() -> Any:
    raise AssertionError("a streamed model is never loaded whole")
