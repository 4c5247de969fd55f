"""What goes into the blocks of a running transformers model: seen, and replaced.

Two kinds of blocks need care. Some run only beside an image (cross-attention): without one, the stream passes them
unchanged. Others pass on several streams, of which their parts read and write one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..stream import Stream

SHARED = "shared_kv_states"  # the argument by which transformers hands keys and values to later blocks
See = Callable[[int, torch.Tensor, Mapping[str, Any]], torch.Tensor | None]
"""Called with a layer, what goes into its block, and the block's named arguments; what it returns goes in instead."""


@dataclass(frozen=True)
class Entry:
    """What a block is given by those before it.

    Attributes:
        hidden: the stream [batch, tokens, d], or several [streams, batch, tokens, d].
        shared: keys and values [batch, ...] of earlier blocks that later ones use as well.
    """

    hidden: torch.Tensor
    shared: Mapping[Any, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return self.hidden.numel() + sum(each.numel() for kept in self.shared.values() for each in kept)

    def copy(self) -> Entry:
        """The same, whatever the block does with the stream."""
        return Entry(self.hidden.clone(), self.shared)

    def repeated(self, count: int) -> Entry:
        """The same with the whole batch `count` times."""
        shared = {key: tuple(torch.cat([each] * count) for each in kept) for key, kept in self.shared.items()}
        return Entry(torch.cat([self.hidden] * count, dim=-3), shared)


@contextmanager
def capturing_inputs(model: nn.Module, take: Callable[[int, torch.Tensor], None]) -> Iterator[nn.Module]:
    """Call `take(layer, hidden_states)` at the input of every block and, last, of the head's norm.

    Hidden states are [batch, tokens, d]; layer `layer_count` is the stream that the head reads. Gradients can be taken
    with respect to them.

    Raises:
        OrthogonalizeError: in the forward pass, if blocks pass on several streams, none of which is known to be read.
    """
    stream = Stream.of(model)

    def see(layer: int, hidden: torch.Tensor, _named: Mapping[str, Any]) -> torch.Tensor | None:
        active = stream.active(hidden)
        take(layer, active)
        return None if active is hidden else stream.with_active(hidden, active)

    with _seeing_inputs(stream, see):
        yield model


@contextmanager
def capturing_entries(model: nn.Module, take: Callable[[int, Entry], None]) -> Iterator[None]:
    """As `capturing_inputs`, with all that `starting_at` needs."""

    def see(layer: int, hidden: torch.Tensor, named: Mapping[str, Any]) -> None:
        take(layer, Entry(hidden, dict(named.get(SHARED) or {})))

    with _seeing_inputs(Stream.of(model), see):
        yield


@contextmanager
def _seeing_inputs(stream: Stream, see: See) -> Iterator[None]:
    """Call `see` before every block and the head's norm; also for a block that is left out, with what passes it."""
    after = 0  # the layer that comes next
    with ExitStack() as stack:
        for layer, module in enumerate(modules_from(stream, 0)):

            def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> Any:
                nonlocal after
                hidden, instead = _given(args, kwargs), None
                for each in range(after if layer >= after else 0, layer + 1):
                    instead = see(each, hidden, kwargs)
                after = layer + 1
                return None if instead is None else _replaced(args, kwargs, instead)

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def changing_input(
    stream: Stream, layer: int, change: Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]
) -> Iterator[None]:
    """Give block `layer` what `change` makes of its input and its named arguments, in every forward pass.

    If a pass leaves that block out, the next is given it.
    """
    last = math.inf
    modules = modules_from(stream, layer) if stream.architecture.images_attended else [stream.block(layer)]
    with ExitStack() as stack:
        for number, module in enumerate(modules):

            def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number) -> Any:
                nonlocal last
                first, last = number <= last, number  # of this pass: earlier ones came as far or further
                return _replaced(args, kwargs, change(_given(args, kwargs), kwargs)) if first else None

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def modules_from(stream: Stream, layer: int) -> list[nn.Module]:
    """Block `layer`, those after it, and the head's norm: the first of them that runs is given the stream there."""
    return [*(stream.block(each) for each in range(layer, stream.layer_count)), stream.head_norm]


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor) -> Any:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
