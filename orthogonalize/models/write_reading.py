"""Read what write matrices take in and put out, a group of layers at a time, behind edits of earlier layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core.errors import OrthogonalizeError
from ..core.interventions import ConditionalMap, WriteMatrix
from .activations import TOKENS_PER_BATCH, batches, pad
from .forward.block_inputs import Entry, capturing_entries
from .forward.partial import Returned, bare, noting_tuples, starting_at, stopping_before
from .forward.prefix import Prefix, shared_length
from .stream import Stream
from .write_matrices import Watch, conditionally_edited, watching, write_modules

MOST_READERS = 4  # that are kept, each at a layer of its own


@dataclass(frozen=True)
class TokenSet:
    """Sequences of token ids; the tokens of sequence i that count are `starts[i]` to `ends[i]` (None: to its end).

    Sets that hold the very same `ids` are read together.
    """

    ids: Sequence[Sequence[int]]
    starts: Sequence[int]
    ends: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.starts) == len(self.lasts):
            raise ValueError(f"{len(self.ids)} sequences, but {len(self.starts)} starts or {len(self.lasts)} ends")

    @property
    def lasts(self) -> list[int]:
        """The end of what counts of each sequence."""
        whole = [len(row) for row in self.ids]
        return whole if self.ends is None else [min(end, n) for end, n in zip(self.ends, whole, strict=True)]

    @property
    def count(self) -> int:
        """The number of tokens that count."""
        return sum(end - start for start, end in zip(self.starts, self.lasts, strict=True))


Take = Callable[[str, WriteMatrix, "int | None", torch.Tensor, torch.Tensor], None]
"""Called with the name of a token set, a write matrix, the expert's number (routed experts only), and the inputs
[tokens, n] and outputs [tokens, d] of the tokens that count."""


@dataclass
class _Batch:
    padded: torch.Tensor
    counted: dict[str, torch.Tensor]  # by set, [batch * tokens], bool
    entry: Entry | None = None  # what goes into the layer that the reader has come to


class WriteReader:
    """Reads token sets layer by layer; the stream at the layer that it has come to is kept, and not computed again.

    Each layer is computed twice: once to be read, and once with its edit, on the way to the next group. What all
    sequences begin with, and does not count, is computed once for all.
    """

    def __init__(self, model: Any, sets: Mapping[str, TokenSet], tokens: int = TOKENS_PER_BATCH) -> None:
        self.model, self.stream = model, Stream.of(model)
        self.batches: list[_Batch] = []
        self.at = 0
        self.returned: Returned = bare
        self.begins = _common_beginning(model, sets)
        self.beginning = _Batch(torch.tensor([self.begins], device=model.device), {})
        skipped = len(self.begins)
        for shared in group_sets(sets):
            ids = next(iter(shared.values())).ids
            for group in batches(ids, tokens):
                padded, _ = pad([ids[i][skipped:] for i in group], model.device)
                counted = counted_tokens(shared, group, padded.shape[1], skipped)
                self.batches.append(_Batch(padded, {name: each.to(model.device) for name, each in counted.items()}))

    def copy(self) -> WriteReader:
        """A reader of the same tokens at the same layer; neither moves the other."""
        other = copy.copy(self)
        other.batches = [replace(batch) for batch in self.batches]
        other.beginning = replace(self.beginning)
        return other

    @torch.inference_mode()
    def advance(self, layer: int) -> None:
        """Go on to `layer` without edits."""
        self._read_all((), layer, layer - 1, lambda *_: None, {})
        self.at = layer

    @torch.inference_mode()
    def read(
        self, matrices: Sequence[WriteMatrix], take: Take, edits: Mapping[WriteMatrix, ConditionalMap] | None = None
    ) -> None:
        """Read `matrices` of some consecutive layers, with `edits` in the layers between the last read and these.

        Call it for ever later layers.
        """
        layers = sorted({int(matrix.site.layer or 0) for matrix in matrices})
        first, last = layers[0], layers[-1]
        if first < self.at:
            raise ValueError(f"layer {first} is behind layer {self.at}, which was read already")
        self._read_all(matrices, first, last, take, edits or {})
        self.at = first

    def _read_all(
        self,
        matrices: Sequence[WriteMatrix],
        first: int,
        last: int,
        take: Take,
        edits: Mapping[WriteMatrix, ConditionalMap],
    ) -> None:
        prefix = Prefix.of(self.model, self.begins)
        if self.begins:
            with self._between(self.beginning, first, last, edits):
                prefix.read(self.model)
        for batch in self.batches:
            with self._between(batch, first, last, edits) as stack:
                watches = {m: watch_counted(stack, self.stream, m, batch.counted, take) for m in matrices}
                stack.enter_context(watching(self.model, watches))
                self.stream.decoder(input_ids=batch.padded, **prefix.before(len(batch.padded)))

    @contextmanager
    def _between(
        self,
        batch: _Batch,
        first: int,
        last: int,
        edits: Mapping[WriteMatrix, ConditionalMap],
    ) -> Iterator[ExitStack]:
        """Let a pass over `batch` begin at the layer that this has come to, and end after `last`; keeps the stream at
        `first`.
        """

        def keep(layer: int, entry: Entry) -> None:
            if layer == first:
                batch.entry = entry.copy()

        start = batch.entry
        with ExitStack() as stack:
            if start is not None and self.at:
                stack.enter_context(starting_at(self.model, self.at, start, self.returned))
            else:
                stack.enter_context(noting_tuples(self.model, self._note))
            stack.enter_context(capturing_entries(self.model, keep))
            stack.enter_context(stopping_before(self.model, last + 1))  # after `keep` has seen that block's input
            stack.enter_context(conditionally_edited(self.model, edits, renormalise=False))
            yield stack

    def _note(self, returned: Returned) -> None:
        self.returned = returned


class Readers:
    """Readers of the same sets that have come to a layer; what begins at one or above shares what is below."""

    def __init__(self, model: Any, sets: Mapping[str, TokenSet]) -> None:
        self.model, self.sets = model, sets
        self._at: dict[int, WriteReader] = {}

    def at(self, layer: int) -> WriteReader:
        """A reader of its own that has come to `layer`."""
        if layer not in self._at:
            below = [at for at in self._at if at < layer]
            reader = self._at[max(below)].copy() if below else WriteReader(self.model, self.sets)
            reader.advance(layer)
            self._at[layer] = reader
            while len(self._at) > MOST_READERS:  # each holds the stream of all tokens
                del self._at[next(at for at in self._at if at != layer)]
        return self._at[layer].copy()


def group_sets(sets: Mapping[str, TokenSet]) -> list[dict[str, TokenSet]]:
    """The sets by what they are read with: those that hold the very same `ids` are read together."""
    together: dict[int, dict[str, TokenSet]] = {}
    for name, each in sets.items():
        together.setdefault(id(each.ids), {})[name] = each
    return list(together.values())


def _common_beginning(model: Any, sets: Mapping[str, TokenSet]) -> list[int]:
    """The tokens that all sequences begin with, none of which counts, if `model` can share them."""
    every = [row for each in sets.values() for row in each.ids]
    starts = [start for each in sets.values() for start in each.starts]
    shared = min([shared_length(model, every), *starts])
    return list(every[0][:shared]) if every else []


def counted_tokens(
    sets: Mapping[str, TokenSet], rows: Sequence[int], width: int, first: int = 0
) -> dict[str, torch.Tensor]:
    """By set, whether each token of the sequences `rows` counts: [batch * tokens], bool.

    These are the tokens from `first` on, padded to `width`.
    """
    places = torch.arange(first, first + width)
    counted = {}
    for name, each in sets.items():
        starts, ends = (torch.tensor([of[i] for i in rows])[:, None] for of in (each.starts, each.lasts))
        counted[name] = ((places >= starts) & (places < ends)).flatten()
    return counted


def watch_counted(
    stack: ExitStack, stream: Stream, matrix: WriteMatrix, counted: Mapping[str, torch.Tensor], take: Take
) -> Watch:
    """A watch of `matrix` that calls `take` with the tokens of each set that count (see `counted_tokens`).

    Hooks that it needs are removed when `stack` is closed.
    """
    if not matrix.routed:

        def dense(inputs: torch.Tensor, outputs: torch.Tensor, _expert: int | None) -> None:
            for name, each in counted.items():
                here = each.to(inputs.device)
                x, y = (part.reshape(-1, part.shape[-1])[here] for part in (inputs, outputs))
                take(name, matrix, None, x, y)

        return dense
    chosen: list[torch.Tensor] = []  # experts [tokens, per token], as the router has chosen them

    def routing(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = args[1] if len(args) > 1 else kwargs.get("top_k_index", kwargs.get("router_indices"))
        chosen[:] = [] if found is None else [found]

    module = write_modules(stream, matrix.site)[matrix].module
    stack.callback(module.register_forward_pre_hook(routing, with_kwargs=True).remove)

    def expert(inputs: torch.Tensor, outputs: torch.Tensor, number: int | None) -> None:
        if chosen:  # transformers computes an expert's tokens in this order
            tokens = torch.eq(chosen[0].mT, number or 0).nonzero(as_tuple=True)[1]
            own = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        else:  # every expert sees all tokens, those that are not its own as zeros
            tokens = torch.arange(len(next(iter(counted.values()))), device=inputs.device)
            own = (inputs != 0).any(-1)
        if len(tokens) != len(inputs):
            raise OrthogonalizeError(
                f"{matrix} has {len(inputs)} tokens where its router chose {len(tokens)}; this version of "
                "transformers routes in another way than can be read, so use --components attn"
            )
        for name, of_set in counted.items():
            here = of_set.to(tokens.device)[tokens] & own
            if here.any():
                take(name, matrix, number, inputs[here], outputs[here])

    return expert
