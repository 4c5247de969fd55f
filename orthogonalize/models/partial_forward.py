"""Run some blocks of a model only: start at a block with a given stream, stop before another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .stream import Stream


class _StoppedError(Exception):
    """The forward pass has come as far as it should."""


def _identity_forward(wrapped: bool) -> Any:
    """A `forward` for a block that returns its input, in a tuple if `wrapped`."""
    return lambda hidden_states, *_args, **_kwargs: (hidden_states,) if wrapped else hidden_states


@contextmanager
def starting_at(model: Any, layer: int, hidden: torch.Tensor, wrapped: bool) -> Iterator[None]:
    """Make `model` start at block `layer` with the input `hidden`; earlier blocks do nothing.

    `wrapped`: whether blocks return tuples (see `returns_tuples`).
    """
    stream = Stream.of(model)
    skipped = [stream.block(i) for i in range(layer)]

    def replace(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (hidden, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}

    handle = stream.block(layer).register_forward_pre_hook(replace, with_kwargs=True)
    for block in skipped:
        block.forward = _identity_forward(wrapped)
    try:
        yield
    finally:
        handle.remove()
        for block in skipped:
            del block.forward


@contextmanager
def stopping_before(model: Any, layer: int) -> Iterator[None]:
    """End the forward pass in this context before block `layer` (the number of layers: before the head's norm)."""
    stream = Stream.of(model)

    def stop(_module: Any, _args: Any) -> None:
        raise _StoppedError

    module = stream.block(layer) if layer < stream.layer_count else stream.head_norm
    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    except _StoppedError:
        pass
    finally:
        handle.remove()
