"""Swap the weights of a running engine in place."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..core.errors import InPlaceError
from .base import Engine, Part, layer_of

PORTION = 2**32  # bytes that are loaded at a time, and that lie in the folder for temporary files


class WeightSwap:
    """In-place edits of a running engine that was started on `source`.

    Engines fuse tensors (q, k and v; gate and up; experts) and cannot load part of a fused one. So whole blocks are
    replaced, all of a layer's attention or all of its MLP, except for tensors that `first_unswappable` has seen
    replaced without the rest of their block.
    """

    def __init__(self, engine: Engine, source: Checkpoint) -> None:
        self.engine, self.source = engine, source
        self.blocks: dict[str, list[str]] = {}
        for name in source.tensors:
            self.blocks.setdefault(block_of(name), []).append(name)
        self.alone: set[str] = set()  # kinds of tensors whose module is replaced without the rest of its block
        self.touched: set[str] = set()

    def apply(self, edited: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        """Load `edited` into the engine, and the source's tensors for everything else."""
        unknown = sorted(set(edited) - self.source.tensors.keys())
        if unknown:
            raise ValueError(f"{self.source.path} has no tensor {unknown[0]}")
        now = {other for name in edited for other in self._replaced_with(name)}
        wanted, self.touched = now | self.touched, now
        for names in self._portions(wanted):
            self.engine.load({name: edited.get(name) or partial(self.source.read, name) for name in names})

    def restore(self) -> None:
        """Load the source's tensors again."""
        self.apply({})

    def _replaced_with(self, name: str) -> list[str]:
        """The tensors that have to be loaded for `name` to be replaced."""
        block = self.blocks[block_of(name)]
        return [each for each in block if module_of(each) == module_of(name)] if kind_of(name) in self.alone else block

    def _portions(self, names: Collection[str]) -> Iterator[list[str]]:
        """`names` by block, as many blocks at a time as fit into `PORTION`."""
        portion: list[str] = []
        size = 0
        for block in sorted({block_of(name) for name in names}):
            own = [name for name in self.blocks[block] if name in names]
            more = sum(self.source.tensors[name].size for name in own)
            if portion and size + more > PORTION:
                yield portion
                portion, size = [], 0
            portion, size = portion + own, size + more
        if portion:
            yield portion

    def first_unswappable(self, names: Iterable[str]) -> str | None:
        """The first of the tensors `names` that the engine cannot replace in place; None if it can replace all.

        An engine may refuse a tensor, or silently ignore it. So one tensor of every kind (names that differ only in
        numbers) is changed: the fingerprint of its layer must change, and change back on restore. It is changed with
        its module alone at first, and with its whole block if that fails. If this returns a name, the engine may hold
        wrong weights and must not be used any more.
        """
        kinds = {kind_of(name): name for name in sorted(names, reverse=True)}
        loaded: dict[Part, str] = {}
        for kind, name in kinds.items():
            layer = layer_of(name)
            if layer not in loaded:
                try:
                    loaded[layer] = self.engine.fingerprint(layer)
                except InPlaceError:
                    return name
            self.alone.add(kind)
            if not self._comes_and_goes(name, loaded[layer]):
                self.alone.remove(kind)
                if not self._comes_and_goes(name, loaded[layer]):
                    return name
        return None

    def _comes_and_goes(self, name: str, loaded: str) -> bool:
        """Whether the fingerprint of its layer, `loaded` now, changes with tensor `name` and changes back."""
        layer = layer_of(name)
        try:
            self.apply({name: partial(_different, self.source, name)})
            changed = self.engine.fingerprint(layer) != loaded
            self.restore()
            return changed and self.engine.fingerprint(layer) == loaded
        except InPlaceError:
            return False


def kind_of(name: str) -> str:
    """What the names of tensors have in common that differ only in numbers."""
    return re.sub(r"\d+", "#", name)


def block_of(name: str) -> str:
    """The block whose tensors may be fused with `name`: `model.layers.3.mlp`, or its own module outside layers."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: i + 2])
    return module_of(name)


def module_of(name: str) -> str:
    """The module that holds a tensor."""
    return name.rpartition(".")[0]


def _different(source: Checkpoint, name: str) -> torch.Tensor:
    """A tensor that differs from the one in `source` in every entry."""
    held = source.read(name)
    return torch.where(held.float() == 1, 2.0, 1.0).to(held.dtype)
