"""What forward passes give under edits: scores of the behaviour, and how far the outputs move."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch

from ..core.interventions import AffineMap, Intervention, Site, block_sites
from ..models.activations import batches, last_tokens, pad
from ..models.forward.block_inputs import Entry, capturing_entries, capturing_inputs
from ..models.forward.logits import logits_at
from ..models.forward.partial import Returned, StreamCache, bare, noting_tuples, starting_at
from ..models.forward.prefix import Prefix, read_prefix, shared_length
from ..models.hooks import input_shifted, intervened, layer_projected
from ..models.stream import Stream
from .readouts import Outputs, Readout

PREFIX = "prefix"  # the name of the pass over the tokens that all prompts begin with


def last_logits(
    model: Any, padded: torch.Tensor, lengths: torch.Tensor, prefix: Prefix | None = None, versions: int = 1
) -> torch.Tensor:
    """Logits [batch, vocabulary] at the last real token of each row; the head is applied only there.

    Rows follow the `prefix`, if there is one, and its `versions`, each as many rows.
    """
    before = (prefix or Prefix()).before(len(padded) // versions)
    ends, row_end = torch.unique(lengths - 1, return_inverse=True)
    logits = logits_at(model, padded, ends, **before)
    return logits[torch.arange(len(padded), device=logits.device), row_end]


@contextmanager
def _reading(model: Any, layers: Sequence[int], lengths: torch.Tensor) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the streams [batch, d] at the last token, at the inputs of `layers`, on the CPU."""
    taken: dict[int, torch.Tensor] = {}

    def take(layer: int, hidden: torch.Tensor) -> None:
        if layer in layers:
            taken[layer] = last_tokens(hidden, lengths, 1)[:, 0].float().cpu()

    if not layers:
        yield taken
        return
    with capturing_inputs(model, take):
        yield taken


@torch.inference_mode()
def read_outputs(
    model: Any,
    ids: Sequence[Sequence[int]],
    layers: Sequence[int] = (),
    around: Callable[[Hashable], AbstractContextManager[Any]] | None = None,
    own: int = 1,
) -> Outputs:
    """What a forward pass gives at the last token of each prompt, in the order of `ids`, on the CPU.

    `around` gives a context for each forward pass, by its number; that of what all prompts begin with is `PREFIX`, and
    leaves each prompt at least `own` tokens.
    """
    found: Outputs | None = None
    shared = shared_length(model, ids, own)
    with around(PREFIX) if around else nullcontext():
        prefix = read_prefix(model, ids[0][:shared])
    for number, group in enumerate(batches(ids)):
        padded, lengths = pad([ids[i][shared:] for i in group], model.device)
        with around(number) if around else nullcontext(), _reading(model, layers, lengths) as taken:
            part = last_logits(model, padded, lengths, prefix).float().softmax(-1).cpu()
        if found is None:
            found = Outputs(
                torch.empty(len(ids), part.shape[-1]),
                {layer: stream.new_empty(len(ids), stream.shape[-1]) for layer, stream in taken.items()},
            )
        found.probabilities[group] = part
        for layer, stream in taken.items():
            found.streams[layer][group] = stream
    assert found is not None
    return found


def first_token_probabilities(model: Any, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """The probabilities [prompts, vocabulary] of the first answer token, on the CPU."""
    return read_outputs(model, ids).probabilities


class PromptScores:
    """Scores of the same prompts under many edits, by one readout.

    The model starts at block `layer` under edits that spare its input.
    """

    def __init__(self, model: Any, ids: Sequence[Sequence[int]], readout: Readout, layer: int = 0) -> None:
        self.model, self.ids, self.readout = model, ids, readout
        self._streams = StreamCache(model, layer)

    @cached_property
    def base(self) -> torch.Tensor:
        """The scores [prompts] of the model as it is."""
        return self._scores(self._streams.recording)

    def edited(self, edited: Callable[[], AbstractContextManager[Any]], spared: bool = False) -> torch.Tensor:
        """The scores [prompts] within the context `edited()`; `spared`: whether it spares the input of `layer`."""
        assert self.base is not None  # from which the streams are recorded

        @contextmanager
        def around(name: Hashable) -> Iterator[None]:
            with self._streams.resumed(name) if spared else nullcontext(), edited():
                yield

        return self._scores(around)

    def _scores(self, around: Callable[[Hashable], AbstractContextManager[Any]]) -> torch.Tensor:
        return self.readout.scores(read_outputs(self.model, self.ids, self.readout.layers, around))


def _repeated(maps: AffineMap, count: int) -> AffineMap:
    """Every map of a batch, `count` times in a row."""
    return AffineMap(*(part.repeat_interleave(count, 0) for part in (maps.u, maps.v, maps.s)))


def _everywhere(maps: AffineMap, layer_count: int) -> Intervention:
    """A batch of maps at every write; a shift is added once, at the embedding."""
    return Intervention(writes={Site("embed"): maps} | dict.fromkeys(block_sites(range(layer_count)), maps.unshifted))


class LocalScorer:
    """What forward passes give under edits at one layer, for a fixed set of prompts.

    An edit at layer l does not affect the blocks before l, so their outputs are computed once and every pass starts at
    l. Several maps (one per position) share a batch, in which each row has its own map; what all prompts begin with is
    computed once for each map. `layers` are those whose streams are read as well.
    """

    def __init__(self, model: Any, ids: Sequence[Sequence[int]], layers: Sequence[int] = ()) -> None:
        self.model, self.layers = model, layers
        shared = shared_length(model, ids)
        self.beginning = list(ids[0][:shared]) if ids else []
        self.groups = [[ids[i][shared:] for i in group] for group in batches(ids, tokens=1024)]
        self.order = [i for group in batches(ids, tokens=1024) for i in group]
        self.inputs: list[list[Entry]] = []
        self.returned: Returned = bare

        def note(returned: Returned) -> None:
            self.returned = returned

        with noting_tuples(model, note), torch.inference_mode():
            self.beginning_inputs: list[Entry] = []
            with capturing_entries(model, lambda _, entry: self.beginning_inputs.append(entry.copy())):
                prefix = read_prefix(model, self.beginning)
            for group in self.groups:
                stream: list[Entry] = []
                padded, _ = pad(group, model.device)
                with capturing_entries(model, lambda _l, e, s=stream: s.append(e.copy())):  # type: ignore[misc]
                    model(input_ids=padded, logits_to_keep=1, **prefix.before(len(group)))
                self.inputs.append(stream)

    def tokens(self, prompts: int) -> float:
        """The tokens of a pass over so many of the prompts, on average; what they begin with counts once."""
        own = sum(len(row) for group in self.groups for row in group)
        return len(self.beginning) + prompts * own / max(1, len(self.order))

    @torch.inference_mode()
    def outputs(self, layer: int, maps: AffineMap, projected: bool) -> Outputs:
        """Probabilities [maps, prompts, vocabulary] and streams [maps, prompts, d] with each of the batched `maps`.

        If `projected`, the maps act on the input and both outputs of the block `layer`, otherwise only on its input.
        """
        at, count, above = Stream.of(self.model), len(maps.s), [each for each in self.layers if each > layer]
        edit = layer_projected if projected else input_shifted
        every_map = maps.to(self.model.device, torch.float32)
        prefix = Prefix()
        if self.beginning:
            begun = self.beginning_inputs[layer].repeated(count)
            with starting_at(self.model, layer, begun, self.returned), edit(self.model, layer, every_map):
                prefix = read_prefix(self.model, self.beginning, count)
        probabilities: list[torch.Tensor] = []
        streams: dict[int, list[torch.Tensor]] = {each: [] for each in self.layers}
        for group, stream in zip(self.groups, self.inputs, strict=True):
            padded, lengths = pad(group, self.model.device)
            rows = _repeated(every_map, len(group))
            resumed = starting_at(self.model, layer, stream[layer].repeated(count), self.returned)
            every = lengths.repeat(count)
            with resumed, edit(self.model, layer, rows), _reading(self.model, above, every) as taken:
                logits = last_logits(self.model, padded.repeat(count, 1), every, prefix, count).float()
            probabilities.append(logits.softmax(-1).reshape(count, len(group), -1).cpu())
            for each in self.layers:
                if each not in taken:  # at or below the edit, which does not reach it
                    taken[each] = (
                        last_tokens(at.active(stream[each].hidden), lengths, 1)[:, 0].float().cpu().repeat(count, 1)
                    )
                streams[each].append(taken[each].reshape(count, len(group), -1))
        place = torch.tensor(self.order).argsort()
        return Outputs(
            torch.cat(probabilities, dim=1)[:, place],
            {each: torch.cat(parts, dim=1)[:, place] for each, parts in streams.items()},
        )


@torch.inference_mode()
def global_outputs(
    model: Any, ids: Sequence[Sequence[int]], maps: AffineMap, layer_count: int, layers: Sequence[int] = ()
) -> Outputs:
    """The same as `LocalScorer.outputs` with each of the batched `maps` at every write.

    For a projection this equals the reference's hooks on every block input and output; a shift is added once, at the
    embedding.
    """
    count, shared = len(maps.s), shared_length(model, ids)
    every_map = maps.to(model.device, torch.float32)
    with intervened(model, _everywhere(every_map, layer_count)):
        prefix = read_prefix(model, ids[0][:shared], count)
    order: list[int] = []
    probabilities: list[torch.Tensor] = []
    streams: dict[int, list[torch.Tensor]] = {each: [] for each in layers}
    for group in batches(ids, tokens=1024):
        edit = _everywhere(_repeated(every_map, len(group)), layer_count)
        padded, lengths = pad([ids[i][shared:] for i in group], model.device)
        every = lengths.repeat(count)
        with intervened(model, edit), _reading(model, layers, every) as taken:
            logits = last_logits(model, padded.repeat(count, 1), every, prefix, count).float()
        probabilities.append(logits.softmax(-1).reshape(count, len(group), -1).cpu())
        for each in layers:
            streams[each].append(taken[each].reshape(count, len(group), -1))
        order += group
    place = torch.tensor(order).argsort()
    return Outputs(
        torch.cat(probabilities, dim=1)[:, place],
        {each: torch.cat(parts, dim=1)[:, place] for each, parts in streams.items()},
    )
