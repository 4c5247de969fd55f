"""Swap the weights of a running engine in place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..core.errors import InPlaceError
from .base import Engine, Part, layer_of


class WeightSwap:
    """In-place edits of a running engine that was started on `source`.

    Engines fuse tensors (q, k and v; gate and up; experts) and cannot load part of a fused one, so whole blocks are
    replaced: all of a layer's attention, or all of its MLP.
    """

    def __init__(self, engine: Engine, source: Checkpoint) -> None:
        self.engine, self.source = engine, source
        self.blocks: dict[str, list[str]] = {}
        for name in source.tensors:
            self.blocks.setdefault(block_of(name), []).append(name)
        self.touched: set[str] = set()

    def apply(self, edited: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        """Load `edited` into the engine, and the source's tensors for everything else."""
        unknown = sorted(set(edited) - self.source.tensors.keys())
        if unknown:
            raise ValueError(f"{self.source.path} has no tensor {unknown[0]}")
        now = {block_of(name) for name in edited}
        weights: dict[str, Callable[[], torch.Tensor]] = {}
        for block in sorted(now | self.touched):
            for name in self.blocks[block]:
                weights[name] = edited.get(name) or partial(self.source.read, name)
        self.touched = now
        if weights:
            self.engine.load(weights)

    def restore(self) -> None:
        """Load the source's tensors again."""
        self.apply({})

    def first_unswappable(self, names: Iterable[str]) -> str | None:
        """The first of the tensors `names` that the engine cannot replace in place; None if it can replace all.

        An engine may refuse a tensor, or silently ignore it. So one tensor of every kind (names that differ only in
        numbers) is changed: the fingerprint of its layer must change, and change back on restore. If this returns a
        name, the engine may hold wrong weights and must not be used any more.
        """
        kinds = {kind_of(name): name for name in sorted(names, reverse=True)}
        loaded: dict[Part, str] = {}
        for name in kinds.values():
            layer = layer_of(name)
            try:
                if layer not in loaded:
                    loaded[layer] = self.engine.fingerprint(layer)
                self.apply({name: partial(_different, self.source, name)})
                changed = self.engine.fingerprint(layer) != loaded[layer]
                self.restore()
                if not changed or self.engine.fingerprint(layer) != loaded[layer]:
                    return name
            except InPlaceError:
                return name
        return None


def kind_of(name: str) -> str:
    """What the names of tensors have in common that differ only in numbers."""
    return re.sub(r"\d+", "#", name)


def block_of(name: str) -> str:
    """The block whose tensors may be fused with `name`: `model.layers.3.mlp`, or its own module outside layers."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: i + 2])
    return name.rpartition(".")[0]


def _different(source: Checkpoint, name: str) -> torch.Tensor:
    """A tensor that differs from the one in `source` in every entry."""
    held = source.read(name)
    return torch.where(held.float() == 1, 2.0, 1.0).to(held.dtype)
