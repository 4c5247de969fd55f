"""The activations of prompts that are scored, kept for the stage that stores them, so that one pass gives both."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...models.activations import batches, capture, check_finite, last_tokens
from ...models.forward.block_inputs import capturing_inputs
from ...models.forward.prefix import shared_length
from ..readouts import Outputs
from ..scoring import PREFIX, read_outputs

Ids = Sequence[Sequence[int]]
MOST = 2**30  # bytes that are kept; prompts beyond are read again


class KeptActivations:
    """The streams at the last `positions` tokens of prompts, at the inputs of all blocks and of the head's norm."""

    def __init__(self, positions: int, most: int = MOST) -> None:
        self.positions, self.most = positions, most
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}

    def outputs(self, model: Any, ids: Ids, layers: Sequence[int], advance: Callable[[int], None]) -> Outputs:
        """As `read_outputs`; keeps the activations of the pass."""
        shared = shared_length(model, ids, self.positions)
        groups = list(batches(ids))

        @contextmanager
        def around(name: Hashable) -> Iterator[None]:
            if name == PREFIX:
                yield
                return
            group = groups[int(str(name))]
            lengths = torch.tensor([len(ids[i]) - shared for i in group])
            taken: list[torch.Tensor] = []

            def take(_layer: int, hidden: torch.Tensor) -> None:
                taken.append(last_tokens(hidden, lengths, self.positions).cpu())

            with capturing_inputs(model, take):
                yield
            for i, rows in zip(group, torch.stack(taken, dim=2), strict=True):
                self._keep(tuple(ids[i]), rows)
            advance(len(group))

        return read_outputs(model, ids, layers, around, own=self.positions)

    def capture(self, model: Any, ids: Ids, positions: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """What `activations.capture` yields, without a pass over prompts whose activations were kept."""
        known = [i for i, row in enumerate(ids) if tuple(row) in self._kept and positions == self.positions]
        if known:
            rows = torch.stack([self._kept[tuple(ids[i])] for i in known])
            for layer in range(rows.shape[2]):
                check_finite(layer, rows[:, :, layer])
            yield known, rows
        left = sorted(set(range(len(ids))) - set(known))
        for group, found in capture(model, [ids[i] for i in left], positions) if left else ():
            yield [left[i] for i in group], found

    def forget(self) -> None:
        """Free what is kept."""
        self._kept.clear()

    def _keep(self, row: tuple[int, ...], activations: torch.Tensor) -> None:
        if (len(self._kept) + 1) * activations.nbytes <= self.most:
            self._kept[row] = activations
