"""What fits conditional edits inside vLLM's workers, which call it by name: tokens never leave them, only maps do."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ....core.errors import OrthogonalizeError
from ....core.interventions import ConditionalMap, Site, WriteMatrix, block_sites
from ....directions.conditional import Weights
from ....edits.fitting.regression import KeptInputs, Regression
from ....engines.reading.stream_worker import WorkerStreams
from ....engines.reading.writes import WriteHooks, written_at

REQUEST, BASES, MAPS = "request.json", "bases.safetensors", "maps.safetensors"  # what the folder of a call holds


class FitWorker:
    """One group of layers to fit.

    Args:
        streams: those of the worker.
        folder: `REQUEST` has the tokens that count and the weights of the regression, `BASES` the directions by site,
            and `MAPS` the maps of earlier groups, which act on the rows that `REQUEST` names.
    """

    def __init__(self, streams: WorkerStreams, folder: Path) -> None:
        self.streams = streams
        request = json.loads((folder / REQUEST).read_text("utf-8"))
        self.weights = Weights(**request["weights"])
        counted = {
            name: {int(row): (first, end) for row, (first, end) in rows.items()}
            for name, rows in request["counted"].items()
        }
        self.hooks = WriteHooks(streams, counted, frozenset(request["edited"]))
        bases = {Site.parse(site): basis for site, basis in load_file(folder / BASES).items()}
        maps = load_file(folder / MAPS) if (folder / MAPS).is_file() else {}
        self.regressions: list[Regression] = []
        for site, basis in bases.items():
            if site.layer in streams.stream.local_layers:
                for module in written_at(streams, site).values():
                    kept = KeptInputs(module, streams.stream, request["shares"])
                    regression = Regression(module, basis, streams.stream, kept)
                    self.hooks.watch(module, partial(_take, regression))
                    self.regressions.append(regression)
        for name in dict.fromkeys(key.rpartition("/")[0] for key in maps):
            matrix = WriteMatrix.parse(name)
            if matrix.site.layer in streams.stream.local_layers:
                edit = ConditionalMap(maps[f"{name}/r"], maps[f"{name}/c"])
                self.hooks.edit(written_at(streams, matrix.site)[matrix], edit)
        self.hooks.stop_after(max(int(site.layer or 0) for site in bases))

    @torch.inference_mode()
    def solve(self, file: Path) -> None:
        """Write the maps of the group to `file`, and remove the hooks."""
        self.hooks.close()
        found: dict[str, torch.Tensor] = {}
        if self.streams.writes:
            for regression in self.regressions:
                solved, _ = regression.solve(self.weights)
                if solved is not None:
                    found |= {f"{regression.matrix}/r": solved.r.cpu(), f"{regression.matrix}/c": solved.c.cpu()}
        if found:
            save_file({name: each.contiguous() for name, each in found.items()}, file)


def _take(regression: Regression, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
    regression.take(name, None, inputs, outputs)


def unseen_kinds(streams: WorkerStreams, rank: int) -> list[str]:
    """The kinds of write sites (`attn`, `mlp`) of which this worker has one that cannot be watched."""
    unseen: set[str] = set()
    for site in block_sites(streams.stream.local_layers):
        try:
            written_at(streams, site)
        except OrthogonalizeError:
            unseen.add(site.kind)
    return sorted(unseen)


_under_way: dict[int, FitWorker] = {}


def begin(streams: WorkerStreams, rank: int, folder: str) -> str:
    """Begin to fit the group of layers that `folder` describes; returns why it is not possible, or nothing."""
    try:
        _under_way[rank] = FitWorker(streams, Path(folder))
    except OrthogonalizeError as error:
        streams.end()
        return str(error)
    return ""


def solve(streams: WorkerStreams, rank: int, folder: str) -> str:
    """Write the maps of the group under way into `folder`; returns why they cannot be solved, or nothing."""
    fit: Any = _under_way.pop(rank)
    try:
        fit.solve(Path(folder) / f"{rank}.safetensors")
    except OrthogonalizeError as error:
        return str(error)
    return ""
