"""Score directions in a vLLM engine: every (map, prompt) is a request, and many share the engine's passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ....core.interrupts import check
from ....core.interventions import AffineMap
from ....core.journal import Journal
from ....core.progress import track
from ....data.prompts import Side
from ....directions.direction_set import Directions
from ....engines.reading.stream_worker import BlockEdit
from ....engines.reading.streams import EngineStreams, Outputs, Portion, Wanted
from ...candidates import Candidate
from ...readouts import FirstToken, Readout
from ...readouts import Outputs as ReadOutputs
from ..direction_scoring import Places
from ..meters import ScoredMaps
from ..noted import Ids, Key, NotedScoring

ROWS = 4096  # requests that are measured together, if whole layers allow
SHARE, SMOOTHED_KL, EXACT_KL, LOGPROB, BASE_LOGPROB = range(5)  # of `outputs.MEASURES`


def scores_of(readout: Readout, portion: Portion) -> torch.Tensor:
    """The scores of a portion's prompts, from the measures of their first output or the streams at their last token."""
    if isinstance(readout, FirstToken):
        return readout.of_share(torch.stack([each[0, SHARE] for each in portion.outputs]))
    streams = {layer: each[:, -1].float() for layer, each in portion.streams.items()}
    return readout.scores(ReadOutputs(torch.empty(0), streams))


def behaviour_of(readout: Readout) -> tuple[int, ...]:
    """The tokens whose probability `readout` needs."""
    return readout.tokens if isinstance(readout, FirstToken) else ()


class ServedScoring(NotedScoring):
    """Scores candidates in the engine of `streams`; see `NotedScoring`."""

    def __init__(
        self,
        streams: EngineStreams,
        prompts: dict[Side, Ids],
        directions: Directions,
        readout: Readout,
        everywhere: bool,
        places: Places,
        layer_norm: bool,
    ) -> None:
        super().__init__(prompts, directions, readout, everywhere, places, layer_norm)
        self.streams = streams

    def score(self, finders: Sequence[str], known: Journal) -> list[Candidate]:
        """The scores of every (finder, position, layer); those that `known` contains are not computed again."""
        missing = self.missing(finders, known)
        if missing:
            self._keep_base()
        total = len(self.places.layers) * len(finders)
        with track("scoring directions", total, "layers") as advance:
            advance(total - len(missing))
            for keys in self._portions(missing, known):
                self._score(keys, known)
                check()
                advance(len(keys))
        return self.candidates(finders, known)

    def _portions(self, keys: Sequence[Key], known: Journal) -> Iterator[list[Key]]:
        """`keys` in groups of about `ROWS` requests, whole layers at a time."""
        group: list[Key] = []
        held = 0
        for layer in sorted({layer for layer, _ in keys}):
            here = [key for key in keys if key[0] == layer]
            needed = sum(request.scores.numel() for request in self.asked(here, known).noted)
            if group and held + needed > ROWS:
                yield group
                group, held = [], 0
            group, held = group + here, held + needed
        if group:
            yield group

    def _keep_base(self) -> None:
        """Let the workers keep the first-token distributions of the negative prompts, for KLs."""
        self.streams.ask("scoring directions", "forget_base")
        wanted = [Wanted(ids, base=number) for number, ids in enumerate(self.prompts["negative"])]
        for _ in self.streams.read("reading the base", wanted, outputs=Outputs((), keep=True)):
            pass

    def _score(self, keys: Sequence[Key], known: Journal) -> None:
        meter = self.asked(keys, known)
        edits: list[BlockEdit] = []
        wanted: list[Wanted] = []
        places: list[tuple[int, int, int]] = []  # of each: the request, the map and the prompt
        for number, request in enumerate(meter.noted):
            for each in range(len(request.edits.maps.s)):
                for prompt, ids in enumerate(self.prompts[request.edits.side]):
                    wanted.append(Wanted(ids, edit=len(edits), base=prompt if request.kl else -1))
                    places.append((number, each, prompt))
                edits.append(self._edit(request.edits, each))
        outputs = Outputs(behaviour_of(self.readout))
        layers = self.readout.layers
        for portion in self.streams.read("scoring", wanted, layers, outputs=outputs, edits=edits):
            scores = scores_of(self.readout, portion)
            for row, score, measured in zip(portion.rows, scores, portion.outputs, strict=True):
                number, each, prompt = places[row]
                asked = meter.noted[number]
                asked.scores[each, prompt] = measured[0, SMOOTHED_KL] if asked.kl else score
        self.put(keys, known, meter)

    def _edit(self, edits: ScoredMaps, number: int) -> BlockEdit:
        maps = edits.maps
        own = AffineMap(maps.u[number], maps.v[number], maps.s[number])
        if edits.layer is None:  # a shift is added once, at the embedding
            return BlockEdit(own, frozenset({0}), frozenset(range(self.directions.layer_count)))
        here = frozenset({edits.layer})
        return BlockEdit(own, here, here if edits.projected else frozenset())
