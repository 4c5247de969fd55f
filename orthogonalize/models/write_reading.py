"""Read what write matrices take in and put out, a group of layers at a time, behind edits of earlier layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import OrthogonalizeError
from ..core.interventions import ConditionalMap, WriteMatrix
from .activations import TOKENS_PER_BATCH, batches, pad
from .hooks import capturing_inputs
from .partial_forward import starting_at, stopping_before
from .stream import Stream
from .write_matrices import Watch, conditionally_edited, watching, write_modules


@dataclass(frozen=True)
class TokenSet:
    """Sequences of token ids; the tokens of sequence i that count are those from `starts[i]` on."""

    ids: Sequence[Sequence[int]]
    starts: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.starts):
            raise ValueError(f"{len(self.ids)} sequences, but {len(self.starts)} starts")

    @property
    def count(self) -> int:
        """The number of tokens that count."""
        return sum(len(row) - start for row, start in zip(self.ids, self.starts, strict=True))


Take = Callable[[str, WriteMatrix, "int | None", torch.Tensor, torch.Tensor], None]
"""Called with the name of a token set, a write matrix, the expert's number (routed experts only), and the inputs
[tokens, n] and outputs [tokens, d] of the tokens that count."""


@dataclass
class _Batch:
    name: str
    padded: torch.Tensor
    counted: torch.Tensor  # [batch * tokens], bool
    hidden: torch.Tensor | None = None  # the stream at the input of the layer that the reader has come to


class WriteReader:
    """Reads token sets layer by layer; the stream at the layer that it has come to is kept, and not computed again.

    Each layer is computed twice: once to be read, and once with its edit, on the way to the next group.
    """

    def __init__(self, model: Any, sets: Mapping[str, TokenSet], tokens: int = TOKENS_PER_BATCH) -> None:
        self.model, self.stream = model, Stream.of(model)
        self.batches: list[_Batch] = []
        self.at = 0
        self.wrapped = False
        for name, tokens_of in sets.items():
            for group in batches(tokens_of.ids, tokens):
                padded, lengths = pad([tokens_of.ids[i] for i in group], model.device)
                starts = torch.tensor([tokens_of.starts[i] for i in group], device=model.device)
                places = torch.arange(padded.shape[1], device=model.device)
                counted = (places >= starts[:, None]) & (places < lengths[:, None])
                self.batches.append(_Batch(name, padded, counted.flatten()))

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
        for batch in self.batches:
            self._read_batch(batch, matrices, first, last, take, edits or {})
        self.at = first

    def _read_batch(
        self,
        batch: _Batch,
        matrices: Sequence[WriteMatrix],
        first: int,
        last: int,
        take: Take,
        edits: Mapping[WriteMatrix, ConditionalMap],
    ) -> None:
        def keep(layer: int, hidden: torch.Tensor) -> None:
            if layer == first:
                batch.hidden = hidden.clone()

        start = batch.hidden
        with ExitStack() as stack:
            stack.enter_context(stopping_before(self.model, last + 1))
            if start is not None and self.at:
                stack.enter_context(starting_at(self.model, self.at, start, self.wrapped))
            else:
                watch = self.stream.block(0).register_forward_hook(self._look)
                stack.callback(watch.remove)
            stack.enter_context(capturing_inputs(self.model, keep))
            stack.enter_context(conditionally_edited(self.model, edits, renormalise=False))
            watches = {matrix: self._watch(stack, batch, matrix, take) for matrix in matrices}
            stack.enter_context(watching(self.model, watches))
            self.stream.decoder(input_ids=batch.padded, use_cache=False)

    def _look(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.wrapped = isinstance(output, tuple)

    def _watch(self, stack: ExitStack, batch: _Batch, matrix: WriteMatrix, take: Take) -> Watch:
        if not matrix.routed:

            def dense(inputs: torch.Tensor, outputs: torch.Tensor, _expert: int | None) -> None:
                x, y = (part.reshape(-1, part.shape[-1])[batch.counted] for part in (inputs, outputs))
                take(batch.name, matrix, None, x, y)

            return dense
        chosen: list[torch.Tensor] = []  # experts [tokens, per token], as the router has chosen them

        def routing(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = args[1] if len(args) > 1 else kwargs.get("top_k_index", kwargs.get("router_indices"))
            chosen[:] = [] if found is None else [found]

        module = write_modules(self.stream, matrix.site)[matrix].module
        stack.callback(module.register_forward_pre_hook(routing, with_kwargs=True).remove)

        def expert(inputs: torch.Tensor, outputs: torch.Tensor, number: int | None) -> None:
            x, y = inputs, outputs
            if chosen:  # transformers computes an expert's tokens in this order
                tokens = torch.eq(chosen[0].mT, number or 0).nonzero(as_tuple=True)[1]
                counted = batch.counted[tokens]
            else:  # every expert sees all tokens, those that are not its own as zeros
                counted = batch.counted & (x != 0).any(-1)
            if len(counted) != len(x):
                raise OrthogonalizeError(
                    f"{matrix} has {len(x)} tokens where its router chose {len(counted)}; this version of transformers "
                    "routes in another way than can be read, so use --components attn"
                )
            if counted.any():
                take(batch.name, matrix, number, x[counted], y[counted])

        return expert
