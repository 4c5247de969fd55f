"""The fitted edits of a run whose model vLLM runs: a group of layers at a time, behind the edits of those before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ....core.errors import OrthogonalizeError
from ....core.interrupts import check
from ....core.interventions import ConditionalMap, WriteMatrix
from ....core.progress import track
from ....core.temporary_folders import temporary_folder
from ....directions.direction_set import Directions
from ....edits.config import Components, EditConfig
from ....edits.fitting.fit import FitTokens, finished_fit, site_groups, spans_of, weights_of
from ....edits.scopes import stream_after
from ....engines.reading.streams import EngineStreams, Wanted
from ....engines.vllm import SLICE
from ....models.write_reading import TokenSet, group_sets
from ...fits import TOKENS, Fits, load_maps
from .fit_worker import BASES, MAPS, REQUEST
from .model import ServedModel

ACTIVITY = "fitting a conditional edit"
WORKER = "orthogonalize.selection.readers.served.fit_worker"


class ServedFits(Fits):
    """Fits conditional edits in the engine of `served`; the other arguments are those of `Fits`."""

    def __init__(self, served: ServedModel, folder: Path, directions: Directions, weights: dict[str, str]) -> None:
        super().__init__(folder, directions, dict(served.source.config), weights, _not_in_process)
        self.served = served

    @cached_property
    def seen(self) -> list[Components]:
        """The components whose inputs the engine shows in every layer; routed experts and some mixers are hidden."""
        unseen = {
            kind for kinds in self.served.streams().ask(ACTIVITY, "call", f"{WORKER}:unseen_kinds") for kind in kinds
        }
        kinds: tuple[Components, ...] = ("attn", "mlp")
        return [kind for kind in kinds if kind not in unseen]

    @property
    def possible(self) -> bool:
        """See `Fits`."""
        return super().possible and bool(self.seen)

    @property
    def components(self) -> Components:
        """See `Fits`."""
        return self.seen[0] if len(self.seen) == 1 else super().components

    def _fit(
        self, choice: EditConfig, ranking: Sequence[int] | None, file: Path
    ) -> Mapping[WriteMatrix, ConditionalMap]:
        tokens, sites = FitTokens.load(self.folder / TOKENS), self._sites(choice, ranking)
        basis_at = spans_of(choice, self.directions)
        bases = {site: basis for site in sites if (basis := basis_at(stream_after(site))) is not None}
        rows, counted = _rows(tokens.sets)
        weights = weights_of(choice)
        edited = sorted({row for name in tokens.changed for row in counted[name]})
        request = {
            "weights": asdict(weights), "shares": tokens.shares(weights), "counted": counted, "edited": edited
        }  # fmt: skip
        maps: dict[str, torch.Tensor] = {}
        with track(ACTIVITY, len(sites), "write sites") as advance:
            for group in site_groups(sites, choice.sequential):
                here = {str(site): bases[site].contiguous() for site in group if site in bases}
                if here:
                    maps |= self._fit_group(request, here, maps, rows)
                    check()
                advance(len(group))
        if maps:
            self._store(finished_fit(_parsed(maps), 0), file)
            return load_maps(file)
        return finished_fit({}, 0).maps  # which says why there are none

    def _fit_group(
        self,
        request: Mapping[str, Any],
        bases: Mapping[str, torch.Tensor],
        maps: Mapping[str, torch.Tensor],
        rows: Sequence[Sequence[Sequence[int]]],
    ) -> dict[str, torch.Tensor]:
        """The maps of one group, with the `maps` of those before it."""
        streams = self.served.streams(max(len(ids) for each in rows for ids in each) + 1)
        with temporary_folder() as folder:
            (folder / REQUEST).write_text(json.dumps(request), "utf-8")
            save_file(dict(bases), folder / BASES)
            if maps:
                save_file({name: each.contiguous() for name, each in maps.items()}, folder / MAPS)
            _ask(streams, "begin", folder)
        number = 0
        for ids in rows:  # one after another: what the target is brought to has to be known before it is read
            for start in range(0, len(ids), SLICE):
                part = [Wanted(row, 0, 0) for row in ids[start : start + SLICE]]
                streams.run(ACTIVITY, part, range(number, number + len(part)))
                number += len(part)
        found: dict[str, torch.Tensor] = {}
        with temporary_folder() as folder:
            _ask(streams, "solve", folder)
            for each in sorted(folder.iterdir()):
                found |= load_file(each)
        return found


def _ask(streams: EngineStreams, function: str, folder: Path) -> None:
    for refused in streams.ask(ACTIVITY, "call", f"{WORKER}:{function}", str(folder)):
        if refused:
            raise OrthogonalizeError(refused)


def _rows(
    sets: Mapping[str, TokenSet],
) -> tuple[list[Sequence[Sequence[int]]], dict[str, dict[int, tuple[int, int]]]]:
    """The sequences that are read together, and by set the positions that count of each, by its number among all."""
    rows: list[Sequence[Sequence[int]]] = []
    counted: dict[str, dict[int, tuple[int, int]]] = {}
    for shared in group_sets(sets):
        start = sum(map(len, rows))
        for name, each in shared.items():
            spans = zip(each.starts, each.lasts, strict=True)
            counted[name] = {start + number: span for number, span in enumerate(spans)}
        rows.append(next(iter(shared.values())).ids)
    return rows, counted


def _parsed(maps: Mapping[str, torch.Tensor]) -> dict[WriteMatrix, ConditionalMap]:
    names = dict.fromkeys(name.rpartition("/")[0] for name in maps)
    return {WriteMatrix.parse(name): ConditionalMap(maps[f"{name}/r"], maps[f"{name}/c"]) for name in names}


def _not_in_process() -> Any:
    raise AssertionError("a served model is never loaded into this process")
