"""Score directions with a model that is never whole in memory: all candidates of many layers in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...core.interventions import AffineMap, Intervention, Site, block_sites
from ...core.journal import Journal
from ...core.progress import note
from ...data.prompts import SIDES, Side
from ...directions.direction_set import Directions
from ...models.hooks import input_shifted, intervened, layer_projected
from ...models.logprobs import smoothed_kl
from ...models.streaming.lanes import StreamedModel
from ...models.streaming.passes import Pass, Variant
from ...models.streaming.state import StreamState
from ...models.streaming.weights import PartialModel
from ..candidates import Candidate
from ..readouts import Outputs, Readout
from .direction_scoring import Places
from .meters import ScoredMaps
from .noted import Ids, Key, NotedScoring

LANE_TOKENS = 1024  # of a lane: few, as there are few prompts, and all variants of a lane pass on one device


class StreamedScoring(NotedScoring):
    """Scores candidates in as few passes as the memory for their streams allows.

    Args:
        readout: scores the behaviour.
        everywhere: also score each edit at every write of the model.
        places: the positions and layers whose directions are scored.
        budget: bytes of streams that may be held at a time.
        state: where a pass is kept between interruptions.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        prompts: dict[Side, Ids],
        directions: Directions,
        readout: Readout,
        everywhere: bool,
        places: Places,
        budget: int,
        state: Path,
    ) -> None:
        layer_norm = streamed.stream.architecture.norms.kind == "layer"
        super().__init__(prompts, directions, readout, everywhere, places, layer_norm)
        self.streamed, self.budget, self.state = streamed, budget, state
        self.sets: dict[str, Ids] = {str(side): ids for side, ids in prompts.items()}

    def score(self, finders: Sequence[str], known: Journal) -> list[Candidate]:
        """The scores of every (finder, position, layer); those that `known` contains are not computed again."""
        portions = list(self._portions(self.missing(finders, known), known))
        if len(portions) > 1:
            note(f"scoring directions takes {len(portions)} passes over the weights, as their streams need more memory")
        before: Pass | None = None
        for number, portion in enumerate(portions):
            following = portions[number + 1][0][0] if number + 1 < len(portions) and not self.everywhere else None
            before = self._score(portion, known, before, following)
        return self.candidates(finders, known)

    def _portions(self, keys: Sequence[Key], known: Journal) -> Iterator[list[Key]]:
        """`keys` in groups whose streams fit into the budget, whole layers at a time."""
        size = {
            side: sum(map(len, ids)) * self.streamed.width * self.streamed.dtype.itemsize
            for side, ids in self.prompts.items()
        }
        group: list[Key] = []
        held = 0
        for layer in sorted({layer for layer, _ in keys}):
            here = [key for key in keys if key[0] == layer]
            noted = self.asked(here, known).noted
            needed = sum(len(request.edits.maps.s) * size[request.edits.side] for request in noted)
            if group and held + needed > self.budget:
                yield group
                group, held = [], 0
            group, held = group + here, held + needed
        if group:
            yield group

    def _score(self, keys: Sequence[Key], known: Journal, before: Pass | None, following: int | None) -> Pass:
        meter = self.asked(keys, known)
        requests = {f"{n}:{i}": (r, i) for n, r in enumerate(meter.noted) for i in range(len(r.edits.maps.s))}
        state = StreamState(self.state, [known.inputs, keys])
        one_pass = Pass(
            self.streamed,
            self.sets,
            [self._variant(name, request.edits, i) for name, (request, i) in requests.items()],
            state,
            tokens=LANE_TOKENS,
            entry=before,
            keep=following,
        )
        one_pass.run("scoring directions")
        base = torch.empty(0)
        for name, lane, logits in one_pass.logits(lambda _set, lane: lane.last(1)[:, 0]):
            found = logits.softmax(-1)
            if name in SIDES:
                base = found
                continue
            request, i = requests[name]
            score = smoothed_kl(base, found) if request.kl else self.readout.scores(Outputs(found, {}))
            request.scores[i, lane.rows] = score.cpu()
        one_pass.lanes, one_pass.forks = {}, {}
        self.put(keys, known, meter)
        state.close()
        return one_pass

    def _variant(self, name: str, edits: ScoredMaps, number: int) -> Variant:
        maps = edits.maps.to(torch.device("cpu"), torch.float32)
        own = AffineMap(maps.u[number], maps.v[number], maps.s[number])
        if edits.layer is None:
            return Variant(name, edits.side, 0, partial(self._everywhere_at, own))
        around = partial(self._local_at, own, edits.layer, layer_projected if edits.projected else input_shifted)
        return Variant(name, edits.side, edits.layer, around)

    def _local_at(
        self,
        own: AffineMap,
        layer: int,
        edit: Callable[..., AbstractContextManager[Any]],
        replica: PartialModel,
        here: int,
    ) -> AbstractContextManager[Any]:
        return edit(replica.model, layer, own.to(replica.device, own.s.dtype)) if here == layer else nullcontext()

    def _everywhere_at(self, own: AffineMap, replica: PartialModel, here: int) -> AbstractContextManager[Any]:
        if here == self.streamed.layer_count:
            return nullcontext()
        own = own.to(replica.device, own.s.dtype)
        writes = dict.fromkeys(block_sites([here]), own.unshifted)
        if here == 0:
            writes[Site("embed")] = own
        return intervened(replica.model, Intervention(writes=writes))
