"""Fit conditional maps in one pass over the weights of a model that is never whole in memory.

A layer's maps are solved as soon as its tokens have passed it. Where layers are fitted in groups, each behind the edits
of those before it, two streams of the target go through a group: one without the group's own edits, which is read, and
one with them, which is where the next group begins. What should not move is read in the unedited model, for all fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from ...core.interrupts import check
from ...core.interventions import ConditionalMap, Site, WriteMatrix
from ...core.progress import track
from ...directions.conditional import Weights
from ...models.streaming.lanes import Lane, StreamedModel
from ...models.streaming.passes import choose_home
from ...models.streaming.state import StreamState
from ...models.streaming.weights import PartialModel
from ...models.write_matrices import WriteModule, conditionally_edited, watching, write_modules
from ...models.write_reading import counted_tokens, group_sets, watch_counted
from ..scopes import stream_after
from .fit import ConditionalFit, FitTokens, finished_fit, site_groups
from .regression import EXAMPLES, KeptInputs, Regression

LANES_PER_FIT = 2  # streams of every target token that a fit needs besides the base's: read, and edited

_Sums = TypeVar("_Sums", Regression, KeptInputs)


@dataclass(frozen=True)
class FitJob:
    """One conditional edit to fit; see `fit_conditional` for its attributes."""

    basis_at: Callable[[int], torch.Tensor | None]
    sites: Sequence[Site]
    weights: Weights
    sequential: bool = True


@dataclass
class _Fit:
    """A fit under way.

    `groups` are those that are not done, as layers. `read` are its lanes without the edits of the first of them, and
    `edited` those with them; None while they are the base's, or the same.
    """

    job: FitJob
    groups: list[list[int]]
    read: list[Lane] | None = None
    edited: list[Lane] | None = None
    maps: dict[WriteMatrix, ConditionalMap] = field(default_factory=dict)
    left_alone: int = 0


def fit_streamed(
    streamed: StreamedModel, tokens: FitTokens, jobs: Mapping[str, FitJob], state: StreamState | None = None
) -> dict[str, ConditionalFit]:
    """Fit several conditional edits, by name, in one pass.

    Args:
        tokens: what they are fitted to.
        state: where the pass is kept between interruptions; to be closed when the fits are safe.

    Raises:
        OrthogonalizeError: a set is empty, or a system cannot be solved.
    """
    fits = {name: _started(job) for name, job in jobs.items()}
    one_pass = _FitPass(streamed, tokens, fits, state)
    one_pass.run()
    return {name: finished_fit(fit.maps, fit.left_alone) for name, fit in fits.items()}


def fits_at_once(streamed: StreamedModel, tokens: FitTokens, budget: int) -> int:
    """How many fits may share a pass whose streams take at most `budget` bytes; at least one."""
    base, own = (
        sum(len(row) for shared in group_sets(sets) for row in next(iter(shared.values())).ids)
        * streamed.width
        * streamed.dtype.itemsize
        for sets in (tokens.sets, tokens.changed)
    )
    return max(1, (budget - base) // (LANES_PER_FIT * own))


def _started(job: FitJob) -> _Fit:
    groups = site_groups(job.sites, job.sequential)
    return _Fit(job, [sorted({int(site.layer or 0) for site in group}) for group in groups])


class _FitPass:
    def __init__(
        self, streamed: StreamedModel, tokens: FitTokens, fits: dict[str, _Fit], state: StreamState | None
    ) -> None:
        self.streamed, self.tokens, self.fits, self.state = streamed, tokens, fits, state
        self.lanes: list[Lane] = []
        self.counted: list[dict[str, torch.Tensor]] = []  # by lane
        groups = [*group_sets(tokens.changed), *group_sets(tokens.unchanged)]
        entered = streamed.enter([next(iter(shared.values())).ids for shared in groups])
        for shared, lanes in zip(groups, entered, strict=True):
            for lane in lanes:
                self.lanes.append(lane)
                counted = counted_tokens(shared, lane.rows, lane.hidden.shape[1])
                self.counted.append({name: each.to(lane.replica.device) for name, each in counted.items()})
        self.changed = sum(1 for counted in self.counted if counted.keys() <= tokens.changed.keys())  # lanes, the first

        base = sum(lane.bytes for lane in self.lanes)
        own = sum(lane.bytes for lane in self.lanes[: self.changed])
        choose_home(self.lanes, base + len(fits) * LANES_PER_FIT * own, len(streamed.replicas))

    def run(self) -> None:
        count = self.streamed.layer_count
        first = self._restore()
        with (
            track("fitting conditional edits", count, "blocks") as advance,
            closing(self.streamed.blocks(first)) as blocks,
        ):
            advance(first)
            for layer in blocks:
                self._pass_fits(layer)
                self.streamed.advance_all(layer, self.lanes)
                if not any(fit.groups for fit in self.fits.values()):
                    break
                if self.state is not None:
                    self.state.passed(layer + 1, self.streamed.parts.block_bytes(layer), self._streams())
                check()
                advance(1)

    def _pass_fits(self, layer: int) -> None:
        kept = self._read_kept(layer)
        for fit in self.fits.values():
            self._pass(fit, layer, kept)

    def _pass(self, fit: _Fit, layer: int, kept: Mapping[WriteMatrix, KeptInputs]) -> None:
        """Take the lanes of a fit through block `layer`, and fit what writes there."""
        if not fit.groups or (fit.read is None and layer < fit.groups[0][0]):
            return
        group = fit.groups[0]
        if fit.read is None:
            fit.read = [lane.fork() for lane in self.lanes[: self.changed]]
        before = [lane.fork() for lane in fit.read]
        maps = self._fit_layer(fit, layer, kept) if layer in group else self._advance(fit.read, layer, {})
        fit.maps |= maps
        if fit.edited is not None or maps:
            fit.edited = before if fit.edited is None else fit.edited
            self._advance(fit.edited, layer, maps)
        if layer == group[-1]:
            fit.groups = fit.groups[1:]
            fit.read, fit.edited = (fit.edited or fit.read) if fit.groups else None, None

    def _advance(
        self, lanes: Sequence[Lane], layer: int, maps: dict[WriteMatrix, ConditionalMap]
    ) -> dict[WriteMatrix, ConditionalMap]:
        """Take lanes through block `layer` with `maps`, and return these."""

        def advance(replica: PartialModel) -> None:
            with torch.inference_mode(), conditionally_edited(replica.model, maps, renormalise=False):
                self.streamed.advance_own(layer, lanes, replica)

        self.streamed.on_every_device(advance)
        return maps

    def _modules(self, fit: _Fit, layer: int) -> list[tuple[WriteModule, torch.Tensor]]:
        """What a fit edits in a block, with the directions that are taken out there."""
        return [
            (module, basis)
            for site in fit.job.sites
            if site.layer == layer and (basis := fit.job.basis_at(stream_after(site))) is not None
            for module in write_modules(self.streamed.stream, site).values()
        ]

    def _read_kept(self, layer: int) -> dict[WriteMatrix, KeptInputs]:
        """What the matrices of block `layer` that any fit edits take in of what should not move, in the base."""
        stream = self.streamed.stream
        modules = {module.matrix: module for fit in self.fits.values() for module, _ in self._modules(fit, layer)}
        kept = {matrix: KeptInputs(module, stream, {}) for matrix, module in modules.items()}
        if not kept:
            return {}
        every = zip(self.lanes[self.changed :], self.counted[self.changed :], strict=True)
        lanes = [(lane.fork(), counted) for lane, counted in every]
        self._read_all(layer, lanes, kept)
        return kept

    def _read_all(
        self, layer: int, lanes: Sequence[tuple[Lane, dict[str, torch.Tensor]]], into: Mapping[WriteMatrix, _Sums]
    ) -> None:
        """Read block `layer` with the lanes of every device."""
        parts = {replica: {m: each.part() for m, each in into.items()} for replica in self.streamed.replicas}
        self.streamed.on_every_device(lambda replica: self._read(replica, layer, lanes, parts[replica]))
        for own in parts.values():  # in the order of devices, so that sums are the same each time
            for matrix, part in own.items():
                into[matrix].add(part, self.streamed.device)

    def _fit_layer(
        self, fit: _Fit, layer: int, kept: Mapping[WriteMatrix, KeptInputs]
    ) -> dict[WriteMatrix, ConditionalMap]:
        """Read block `layer`, and return the maps of what writes there."""
        stream = self.streamed.stream
        shares = self.tokens.shares(fit.job.weights)
        regressions = {
            module.matrix: Regression(module, basis, stream, kept[module.matrix].weighed(shares))
            for module, basis in self._modules(fit, layer)
        }
        assert fit.read is not None
        for lanes in self._in_turn(fit.read):
            self._read_all(layer, lanes, regressions)
        maps = {}
        for matrix, regression in regressions.items():
            found, alone = regression.solve(fit.job.weights)
            fit.left_alone += alone
            if found is not None:
                maps[matrix] = found
        return maps

    def _in_turn(self, lanes: Sequence[Lane]) -> list[list[tuple[Lane, dict[str, torch.Tensor]]]]:
        """Lanes of a fit with what counts of them: examples first, to whose means other tokens are brought."""
        every = list(zip(lanes, self.counted[: self.changed], strict=True))
        examples = [pair for pair in every if any(name.partition("@")[0] == EXAMPLES for name in pair[1])]
        return [part for part in (examples, every[len(examples) :]) if part]

    def _read(
        self,
        replica: PartialModel,
        layer: int,
        lanes: Sequence[tuple[Lane, dict[str, torch.Tensor]]],
        readers: Mapping[WriteMatrix, Regression | KeptInputs],
    ) -> None:
        """Read block `layer` with the lanes of one device."""
        counted = {id(lane): each for lane, each in lanes}
        for lane in self.streamed.own((lane for lane, _ in lanes), replica):
            with ExitStack() as stack, torch.inference_mode():
                watches = {
                    matrix: watch_counted(
                        stack, replica.stream, matrix, counted[id(lane)],
                        lambda name, m, *rest: readers[m].take(name, *rest),
                    )
                    for matrix in readers
                }  # fmt: skip
                stack.enter_context(watching(replica.model, watches))
                self.streamed.advance(layer, lane)

    # interruptions

    def _streams(self) -> dict[str, torch.Tensor]:
        """Everything that an interrupted pass needs to resume, by name."""
        found = {f"base/{number}": lane.hidden for number, lane in enumerate(self.lanes)}
        for name, fit in self.fits.items():
            for kind in ("read", "edited"):
                for number, lane in enumerate(getattr(fit, kind) or ()):
                    found[f"{name}/{kind}/{number}"] = lane.hidden
            found[f"{name}/left_alone"] = torch.tensor(fit.left_alone)
            for matrix, each in fit.maps.items():
                found |= {f"{name}/r/{matrix}": each.r, f"{name}/c/{matrix}": each.c}
        return found

    def _restore(self) -> int:
        """Go to the layer that an interrupted pass had come to, and return it."""
        if self.state is None or not self.state.layer:
            return 0
        stored, layer = self.state.load(), self.state.layer
        bases = [lane.fork() for lane in self.lanes[: self.changed]]
        for number, lane in enumerate(self.lanes):
            lane.hidden = stored[f"base/{number}"].to(lane.hidden.device)
        for name, fit in self.fits.items():
            fit.groups = [group for group in fit.groups if group[-1] >= layer]
            for kind in ("read", "edited"):
                if f"{name}/{kind}/0" in stored:
                    lanes = [lane.fork() for lane in bases]
                    for number, lane in enumerate(lanes):
                        lane.hidden = stored[f"{name}/{kind}/{number}"].to(lane.hidden.device)
                    setattr(fit, kind, lanes)
            fit.left_alone = int(stored[f"{name}/left_alone"])
            prefix = f"{name}/r/"
            for key in (key for key in stored if key.startswith(prefix)):
                matrix = key.removeprefix(prefix)
                fit.maps[WriteMatrix.parse(matrix)] = ConditionalMap(stored[key], stored[f"{name}/c/{matrix}"])
        return layer
