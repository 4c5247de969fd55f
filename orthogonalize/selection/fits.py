"""The fitted edits of a run: made when they are first asked for, and kept in the run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..architectures.schema import architecture_of
from ..core.files import fingerprint, write_atomically
from ..core.interventions import ConditionalMap, Intervention, Site, WriteMatrix
from ..core.progress import note
from ..directions.direction_set import Directions, read_tensors
from ..edits.build import scale_sites
from ..edits.config import Components, EditConfig
from ..edits.fitting.fit import ConditionalFit, FitTokens, fit_conditional, sites_to_fit, spans_of, weights_of
from ..edits.fitting.kept import KeptReader
from ..models.write_reading import Readers

TOKENS = "tokens.json"  # of the model's own answers, in the run folder
FOLDER = "fits"
FORM = 2  # of what is fitted and how; fits of another are not used


class Fits:
    """Fits conditional edits to one model, and stores them in a run folder by everything that they depend on.

    Args:
        folder: the run folder.
        directions: the run's.
        config: the model's configuration.
        weights: the SHA-256 of each of its weight files.
        load: loads the model when it is first needed.
    """

    def __init__(
        self,
        folder: Path,
        directions: Directions,
        config: dict[str, Any],
        weights: dict[str, str],
        load: Callable[[], Any],
    ) -> None:
        layer_norm = architecture_of(config).norms.kind == "layer"
        self.folder, self.directions = folder, directions.centred() if layer_norm else directions
        self.weights, self.load = weights, load
        self._readers: Readers | None = None  # of what is to change
        self._kept: KeptReader | None = None

    @cached_property
    def _directions(self) -> str:
        return hashlib.sha256(self.directions.mean_diffs.numpy().tobytes()).hexdigest()

    @property
    def possible(self) -> bool:
        """Whether the run has the model's own answers, without which nothing can be fitted."""
        return (self.folder / TOKENS).is_file()

    @property
    def components(self) -> Components:
        """The components of blocks whose inputs can be read, and so be fitted to."""
        return "both"

    def intervention(self, choice: EditConfig, ranking: Sequence[int] | None = None) -> Intervention:
        """The edit of `choice`, from the store or fitted now.

        Raises:
            OrthogonalizeError: the run has no directions or answers for it.
        """
        file = self._file(choice, ranking)
        maps = load_maps(file) if file.is_file() else self._fit(choice, ranking, file)
        scaled = {matrix: each.scaled(choice.strength) for matrix, each in maps.items()}
        return scale_sites(choice, Intervention(conditional=scaled))

    def _sites(self, choice: EditConfig, ranking: Sequence[int] | None) -> list[Site]:
        return sites_to_fit(choice, self.directions.layer_count, ranking)

    def _file(self, choice: EditConfig, ranking: Sequence[int] | None) -> Path:
        """Where the fit of `choice` is stored."""
        tokens = self.folder / TOKENS
        depends = {
            "form": FORM,
            **choice.model_dump(include={"span", "position", "rank", "sequential"}),
            "sites": [str(site) for site in self._sites(choice, ranking)],
            "regression": asdict(weights_of(choice)),
            "weights": self.weights,
            "directions": self._directions,
            "tokens": hashlib.sha256(tokens.read_bytes()).hexdigest() if tokens.is_file() else None,
        }
        return self.folder / FOLDER / f"{fingerprint(depends)[:16]}.safetensors"

    def _fit(
        self, choice: EditConfig, ranking: Sequence[int] | None, file: Path
    ) -> Mapping[WriteMatrix, ConditionalMap]:
        """Fit `choice`, and store the maps in `file`."""
        sites, read = self._sites(choice, ranking), FitTokens.load(self.folder / TOKENS)
        self._readers = self._readers or Readers(self.load(), read.changed)
        reader = self._readers.at(min((int(site.layer or 0) for site in sites), default=0))
        self._kept = self._kept or KeptReader(self.load(), read.unchanged)
        fit = fit_conditional(
            self.load(), read, spans_of(choice, self.directions), sites, weights_of(choice),
            sequential=choice.sequential, reader=reader, kept=self._kept,
        )  # fmt: skip
        self._store(fit, file)
        return fit.maps

    def _store(self, fit: ConditionalFit, file: Path) -> None:
        if fit.left_alone:
            note(f"{fit.left_alone} experts saw too few tokens to be fitted, and are left as they are")
        _save(fit, file)


def _save(fit: ConditionalFit, file: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for matrix, each in fit.maps.items():
        tensors |= {f"{matrix}/r": each.r, f"{matrix}/c": each.c}
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, save(tensors))


def load_maps(file: Path) -> dict[WriteMatrix, ConditionalMap]:
    """The maps of a stored fit, at strength 1."""
    tensors = read_tensors(file)
    names = dict.fromkeys(name.rpartition("/")[0] for name in tensors)
    return {WriteMatrix.parse(name): ConditionalMap(tensors[f"{name}/r"], tensors[f"{name}/c"]) for name in names}
