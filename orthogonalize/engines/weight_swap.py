"""In-place edits of a running engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..core.errors import InPlaceError
from .base import Engine, Part, layer_of


class WeightSwap:
    """In-place edits of a running engine, started from the folder of `source`; what is not edited is as stored.

    Engines fuse tensors (q, k and v; gate and up; experts), and a fused one cannot be given in part, so
    whole blocks are replaced: all of a layer's attention, or all of its MLP.
    """

    def __init__(self, engine: Engine, source: Checkpoint) -> None:
        self.engine, self.source = engine, source
        self.blocks: dict[str, list[str]] = {}
        for name in source.tensors:
            self.blocks.setdefault(block_of(name), []).append(name)
        self.touched: set[str] = set()

    def apply(self, edited: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        """Let the engine hold `edited` and, for all else, the tensors of the source."""
        unknown = sorted(set(edited) - self.source.tensors.keys())
        if unknown:
            raise ValueError(f"{unknown[0]} is no tensor of {self.source.path}")
        now = {block_of(name) for name in edited}
        weights: dict[str, Callable[[], torch.Tensor]] = {}
        for block in sorted(now | self.touched):
            for name in self.blocks[block]:
                weights[name] = edited.get(name) or partial(self.source.read, name)
        self.touched = now
        if weights:
            self.engine.load(weights)

    def restore(self) -> None:
        """The source again."""
        self.apply({})

    def first_unswappable(self, names: Iterable[str]) -> str | None:
        """One of the tensors `names` whose like the engine does not take over in place; None where it takes all.

        An engine may refuse, or go on with what it had and say nothing. So of every kind of tensor (of names that
        differ in numbers only) one is changed: what the engine holds of its layer must then be another, and the
        same again when it is restored. Where it is not, the engine is not to be used any more.
        """
        kinds = {re.sub(r"\d+", "#", name): name for name in sorted(names, reverse=True)}
        loaded: dict[Part, str] = {}
        for name in kinds.values():
            layer = layer_of(name)
            try:
                if layer not in loaded:
                    loaded[layer] = self.engine.fingerprint(layer)
                self.apply({name: partial(_other, self.source, name)})
                changed = self.engine.fingerprint(layer) != loaded[layer]
                self.restore()
                if not changed or self.engine.fingerprint(layer) != loaded[layer]:
                    return name
            except InPlaceError:
                return name
        return None


def block_of(name: str) -> str:
    """What `name` may be fused with: `model.layers.3.mlp` for everything under it, else its own module."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: i + 2])
    return name.rpartition(".")[0]


def _other(source: Checkpoint, name: str) -> torch.Tensor:
    """A tensor that is nowhere what `source` holds."""
    held = source.read(name)
    return torch.where(held.float() == 1, 2.0, 1.0).to(held.dtype)
