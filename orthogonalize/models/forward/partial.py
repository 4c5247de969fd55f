"""Run some blocks of a model only: start at a block with a given stream, stop before another."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..stream import Stream
from .block_inputs import SHARED, Entry, capturing_entries, changing_input, modules_from

KEPT = 2**28  # numbers of a `StreamCache`: 1 GiB in float32


class _StoppedError(Exception):
    """The forward pass has come as far as it should."""


Returned = Callable[[torch.Tensor], Any]
"""Makes a stream [batch, tokens, d] what the blocks of a model return: itself, or a tuple that begins with it."""


def bare(hidden: torch.Tensor) -> torch.Tensor:
    """What blocks that return no tuple return."""
    return hidden


@contextmanager
def noting_tuples(model: Any, take: Callable[[Returned], None]) -> Iterator[None]:
    """Call `take` with how blocks return the stream, when the first block runs in this context."""

    def look(_module: Any, _inputs: Any, output: Any) -> None:
        beside = [None] * (len(output) - 1) if isinstance(output, tuple) else []
        take((lambda hidden: (hidden, *beside)) if isinstance(output, tuple) else bare)

    handle = Stream.of(model).block(0).register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def starting_at(model: Any, layer: int, entry: Entry, returned: Returned) -> Iterator[None]:
    """Make `model` start at block `layer` with what `entry` has; earlier blocks do nothing.

    `returned`: how blocks return the stream (see `noting_tuples`).
    """
    stream = Stream.of(model)
    skipped = [stream.block(i) for i in range(layer)]

    def replace(_hidden: torch.Tensor, named: Mapping[str, Any]) -> torch.Tensor:
        if entry.shared:
            named[SHARED].update(entry.shared)
        return entry.hidden

    with (
        changing_input(stream, layer, replace),
        replaced_forwards(skipped, lambda hidden_states, *_args, **_kwargs: returned(hidden_states)),
    ):
        yield


@contextmanager
def replaced_forwards(blocks: Sequence[Any], forward: Any) -> Iterator[None]:
    """Let `forward` stand for the forward of each block in this context; one that accelerate gave it comes back."""
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


@contextmanager
def stopping_before(model: Any, layer: int) -> Iterator[None]:
    """End the forward pass in this context before block `layer` (the number of layers: before the head's norm).

    If the pass leaves that block out, it ends before the next.
    """
    stream = Stream.of(model)

    def stop(_module: Any, _args: Any) -> None:
        raise _StoppedError

    handles = [module.register_forward_pre_hook(stop) for module in modules_from(stream, layer)]
    try:
        yield
    except _StoppedError:
        pass
    finally:
        for handle in handles:
            handle.remove()


class StreamCache:
    """The stream at the input of block `layer` in forward passes that are made again with later blocks edited.

    A pass is known by a name; it must have the same tokens each time. At most `kept` numbers are kept, on the model's
    device; passes beyond are computed from their beginning.
    """

    def __init__(self, model: Any, layer: int, kept: int = KEPT) -> None:
        self.model, self.layer, self.kept = model, layer, kept
        self._entries: dict[Hashable, Entry] = {}
        self._returned: Returned = bare

    @contextmanager
    def recording(self, name: Hashable) -> Iterator[None]:
        """Keep the stream of the forward pass in this context; the blocks before `layer` must not be edited."""

        def keep(layer: int, entry: Entry) -> None:
            held = sum(kept.numel for kept in self._entries.values())
            if layer == self.layer and held + entry.numel <= self.kept:
                self._entries[name] = entry.copy()

        def note(returned: Returned) -> None:
            self._returned = returned

        if not self.layer:
            yield
            return
        with noting_tuples(self.model, note), capturing_entries(self.model, keep):
            yield

    @contextmanager
    def resumed(self, name: Hashable) -> Iterator[None]:
        """Start the forward pass in this context at block `layer`, or at its beginning if it was not kept."""
        if name not in self._entries:
            yield
            return
        with starting_at(self.model, self.layer, self._entries[name], self._returned):
            yield
