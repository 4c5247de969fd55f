"""The tokens of the forward pass that a vLLM worker is about to make, by the request that each belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ...core.errors import OrthogonalizeError

KEY = "orthogonalize_row"  # of a request's `extra_args`: the fields of `Mark`


@dataclass(frozen=True)
class Mark:
    """What is wanted of a request.

    Attributes:
        row: its number.
        edit: the number of what edits it; -1 for nothing.
        first, end: the positions whose outputs are wanted.
        base: the number of the base's sequence that its outputs are compared with; -1 for none.
    """

    row: int
    edit: int
    first: int
    end: int
    base: int = -1

    def arguments(self) -> dict[str, list[int]]:
        """The request's `extra_args`."""
        return {KEY: [self.row, self.edit, self.first, self.end, self.base]}


class Token(NamedTuple):
    """A token of a marked request: its row and position, that of the base, and the token that follows it (or -1)."""

    row: int
    position: int
    base: int
    following: int

    @property
    def base_place(self) -> tuple[int, int]:
        """What it is compared with."""
        return self.base, self.position


@dataclass(frozen=True)
class Span:
    """The consecutive tokens of one request in a forward pass.

    Attributes:
        mark: the request's.
        start: the first token's place in the pass.
        first: its position in the request.
        count: the number of tokens.
        ids: the request's prompt.
    """

    mark: Mark
    start: int
    first: int
    count: int
    ids: list[int]

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.first + self.count

    def places(self, first: int, end: int) -> range:
        """The places in the pass of the request's tokens from position `first` to `end`."""
        begin, stop = max(first, self.first), min(end, self.end)
        return range(self.start + begin - self.first, self.start + max(begin, stop) - self.first)


@dataclass
class Tokens:
    """Some of a pass's tokens, and their places in it."""

    places: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    _index: torch.Tensor | None = None

    def add(self, span: Span, places: Iterable[int]) -> None:
        """Add tokens of `span` by their places."""
        for place in places:
            position = span.first + place - span.start
            following = span.ids[position + 1] if position + 1 < len(span.ids) else -1
            self.places.append(place)
            self.tokens.append(Token(span.mark.row, position, span.mark.base, following))

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of `values` [tokens of the pass, ...] that belong to these tokens."""
        if self._index is None or self._index.device != values.device:
            self._index = torch.tensor(self.places, dtype=torch.long, device=values.device)
        return values.index_select(0, self._index)

    def put(self, values: torch.Tensor, into: torch.Tensor) -> None:
        """Write `values` over the rows of `into` that belong to these tokens."""
        assert self._index is not None
        into.index_copy_(0, self._index, values)


@dataclass(frozen=True)
class Step:
    """The marked requests' tokens in a pass; `positions` is how many are wanted at the end of each prompt."""

    spans: list[Span]
    positions: int

    @cached_property
    def count(self) -> int:
        """The number of tokens up to the last of them."""
        return max((span.start + span.count for span in self.spans), default=0)

    @cached_property
    def last(self) -> Tokens:
        """The tokens at the wanted positions."""
        found = Tokens()
        for span in self.spans:
            found.add(span, span.places(len(span.ids) - self.positions, len(span.ids)))
        return found

    @cached_property
    def outputs(self) -> Tokens:
        """The tokens whose outputs are wanted."""
        found = Tokens()
        for span in self.spans:
            found.add(span, span.places(span.mark.first, span.mark.end))
        return found

    @cached_property
    def edited(self) -> dict[int, Tokens]:
        """The tokens by the number of what edits them."""
        found: dict[int, Tokens] = {}
        for span in self.spans:
            if span.mark.edit >= 0:
                found.setdefault(span.mark.edit, Tokens()).places += range(span.start, span.start + span.count)
        return found


def check_positions(spans: Sequence[Span], positions: torch.Tensor) -> None:
    """Check against the `positions` [..., tokens] that the model is given that the tokens are where `spans` say.

    Raises:
        OrthogonalizeError: they are not, so this version of vLLM prepares its passes otherwise.
    """
    given = positions.reshape(-1, positions.shape[-1])[0].tolist()
    if any(given[span.start : span.start + span.count] != list(range(span.first, span.end)) for span in spans):
        raise OrthogonalizeError(
            "this version of vLLM prepares its passes in a way that is not known; use --engine stream"
        )


def spans_of(runner: Any) -> list[Span]:
    """The tokens of the pass that vLLM's model runner (V1) has prepared, of requests that are marked with `KEY`.

    A prompt may be spread over several passes (chunked prefill), and a pass holds tokens of many.
    """
    batch = runner.input_batch
    starts = runner.query_start_loc.np
    found = []
    for number, name in enumerate(batch.req_ids):
        request = runner.requests.get(name)
        marked = (getattr(request.sampling_params, "extra_args", None) or {}).get(KEY) if request else None
        if marked is not None:
            start, end = int(starts[number]), int(starts[number + 1])
            first = int(batch.num_computed_tokens_cpu[number])
            found.append(Span(Mark(*marked), start, first, end - start, request.prompt_token_ids))
    return found
