"""One pass over the weights: prompts go through every block, and so do edited variants of the model, beside the base.

A variant leaves the base's stream at the first block that its edit changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...core.interrupts import check
from ...core.interventions import Intervention
from ...core.progress import track
from ..activations import TOKENS_PER_BATCH
from ..hooks import intervened
from .lanes import Lane, StreamedModel
from .state import StreamState
from .weights import PartialModel

ON_DEVICE = 2**31  # bytes of streams that stay on a GPU; more are kept on the host


def choose_home(lanes: Sequence[Lane], needed: int, devices: int = 1) -> None:
    """Keep streams on the host if they and what leaves them, `needed` bytes in all, would take too much of the GPUs."""
    if needed > ON_DEVICE * devices:
        for lane in lanes:
            lane.hidden = lane.hidden.cpu()


@dataclass(frozen=True)
class Variant:
    """An edited model, through which a set of prompts passes as well.

    Attributes:
        name: tells it from other variants of the pass.
        ids: the name of the set of prompts.
        start: the first block that it changes (the number of layers: only what is behind them).
        around: gives, by replica and block, a context in which the block that is held is edited; by the number of
            layers, one in which the head is.
    """

    name: str
    ids: str
    start: int
    around: Callable[[PartialModel, int], AbstractContextManager[Any]]


def edited_variant(name: str, ids: str, intervention: Intervention, layer_count: int) -> Variant:
    """The variant with `intervention`, which acts exactly as the baked weights would."""
    parts = {layer: intervention.at(layer, layer_count) for layer in range(layer_count + 1)}
    start = next((layer for layer, part in parts.items() if part is not None), layer_count)

    def around(replica: PartialModel, layer: int) -> AbstractContextManager[Any]:
        part = parts[layer]
        return nullcontext() if part is None else intervened(replica.model, part, renormalise=False)

    return Variant(name, ids, start, around)


@dataclass
class Pass:
    """A pass of named sets of prompts (token ids), and of variants, through a model.

    Attributes:
        sets: prompts by name.
        variants: see `Variant`.
        state: where the pass is kept between interruptions.
        take: called with the layer and the lanes of each set at the input of each block, and behind the last one.
        entry: an earlier pass of the same sets, to start where it has kept their lanes.
        keep: the layer at which to keep the lanes of the sets, for a later pass.
    """

    streamed: StreamedModel
    sets: Mapping[str, Sequence[Sequence[int]]]
    variants: Sequence[Variant] = ()
    state: StreamState | None = None
    take: Callable[[int, Mapping[str, list[Lane]]], None] = lambda _layer, _lanes: None
    tokens: int = TOKENS_PER_BATCH
    entry: Pass | None = None
    keep: int | None = None
    lanes: dict[str, list[Lane]] = field(default_factory=dict, init=False)
    forks: dict[str, list[Lane]] = field(default_factory=dict, init=False)
    kept: dict[str, list[Lane]] = field(default_factory=dict, init=False)

    def run(self, description: str) -> None:
        """Take everything through all blocks.

        Raises:
            OrthogonalizeError: see `StreamedModel.enter`, and what `take` raises.
        """
        count = self.streamed.layer_count
        first = self._enter()
        with track(description, count, "blocks") as advance, closing(self.streamed.blocks(first)) as blocks:
            advance(first)
            for layer in blocks:
                self.take(layer, self.lanes)
                self._keep(layer)
                self._fork(layer)
                self._advance(layer)
                if self.state is not None and layer + 1 < count:
                    self.state.passed(layer + 1, self.streamed.parts.block_bytes(layer), self._streams())
                check()
                advance(1)
        self.take(count, self.lanes)
        self._fork(count)

    def logits(self, wanted: Callable[[str, Lane], torch.Tensor]) -> Iterator[tuple[str, Lane, torch.Tensor]]:
        """Logits [n, vocabulary] of every lane, with its set's or its variant's name; to be called after `run`.

        A lane of a set comes before those of its variants. `wanted` gives, by the name of a set, the streams [n, d] of
        a lane to compute them of.
        """
        by_name = {variant.name: variant for variant in self.variants}
        with self.streamed.head():
            for set_name, lanes in self.lanes.items():
                own = [v for v in by_name.values() if v.ids == set_name]
                for number, lane in enumerate(lanes):
                    yield set_name, lane, self.streamed.logits(wanted(set_name, lane))
                    for variant in own:
                        fork = self.forks[variant.name][number]
                        with variant.around(self.streamed.parts, self.streamed.layer_count):
                            found = self.streamed.logits(wanted(set_name, fork))
                        yield variant.name, fork, found
                    check()

    def _enter(self) -> int:
        """Make the lanes, and return the layer at whose input they stand."""
        if self.entry is not None and self.entry.kept:
            assert self.entry.keep is not None
            self.lanes, first = self.entry.kept, self.entry.keep
            self.entry = None
        else:
            streams = [1 + sum(variant.ids == name for variant in self.variants) for name in self.sets]
            entered = self.streamed.enter(list(self.sets.values()), self.tokens, streams)
            self.lanes = dict(zip(self.sets, entered, strict=True))
            first = 0
        self._choose_home()
        return self._restore() or first

    def _keep(self, layer: int) -> None:
        if layer == self.keep:
            self.kept = _forked(self.lanes)

    def _choose_home(self) -> None:
        sizes = {name: sum(lane.bytes for lane in lanes) for name, lanes in self.lanes.items()}
        every = [lane for lanes in self.lanes.values() for lane in lanes]
        needed = sum(sizes.values()) + sum(sizes[variant.ids] for variant in self.variants)
        choose_home(every, needed, len(self.streamed.replicas))

    def _fork(self, layer: int) -> None:
        for variant in self.variants:
            if variant.start == layer:
                self.forks |= {variant.name: [lane.fork() for lane in self.lanes[variant.ids]]}

    def _advance(self, layer: int) -> None:
        self.streamed.on_every_device(partial(self._advance_on, layer))

    def _advance_on(self, layer: int, replica: PartialModel) -> None:
        """Take the lanes of one device through block `layer`."""
        for variant in self.variants:
            if variant.start <= layer:
                with torch.inference_mode(), variant.around(replica, layer):
                    self.streamed.advance_own(layer, self.forks[variant.name], replica)
        for lanes in self.lanes.values():
            self.streamed.advance_own(layer, lanes, replica)

    def _named(self) -> dict[str, Lane]:
        """Every lane by the name of its stream in the state."""
        groups = {f"set/{name}": lanes for name, lanes in self.lanes.items()}
        groups |= {f"variant/{name}": lanes for name, lanes in self.forks.items()}
        return {f"{name}/{number}": lane for name, lanes in groups.items() for number, lane in enumerate(lanes)}

    def _streams(self) -> dict[str, torch.Tensor]:
        return {name: lane.hidden for name, lane in self._named().items()}

    def _restore(self) -> int:
        """Go to the layer that an interrupted pass had come to, and return it."""
        if self.state is None or not self.state.layer:
            return 0
        for layer in range(self.state.layer):
            self._fork(layer)
        stored = self.state.load()
        for name, lane in self._named().items():
            lane.hidden = stored[name].to(lane.hidden.device)
        return self.state.layer


def _forked(lanes: Mapping[str, list[Lane]]) -> dict[str, list[Lane]]:
    return {name: [lane.fork() for lane in each] for name, each in lanes.items()}
