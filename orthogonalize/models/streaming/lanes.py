"""Push batches of prompts through a model one block at a time, instead of the model past one batch at a time.

What a block receives besides the stream (masks, rotary embeddings, positions) is not worked out per family: the text
model's own forward pass runs once per batch with every block replaced by a recorder of its arguments.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...core.errors import OrthogonalizeError
from ..activations import TOKENS_PER_BATCH, batches, last_tokens, pad
from ..forward.partial import Returned, bare, noting_tuples, replaced_forwards, stopping_before
from ..stream import Stream
from .weights import PartialModel

HEAD_NUMBERS = 2**26  # logits computed at a time: 256 MiB in float32


@dataclass(frozen=True)
class _Call:
    """What a block receives besides the stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Lane:
    """A batch of prompts on its way through the blocks.

    Attributes:
        rows: the numbers of its prompts.
        lengths: their lengths in tokens, [batch].
        hidden: the stream at the input of the next block, [batch, tokens, d].
    """

    rows: list[int]
    lengths: torch.Tensor
    hidden: torch.Tensor
    _calls: Sequence[_Call]

    def fork(self) -> Lane:
        """A lane of the same prompts with the stream as it is now; neither moves the other."""
        return replace(self)

    @property
    def bytes(self) -> int:
        """The size of its stream in memory."""
        return self.hidden.numel() * self.hidden.element_size()

    def last(self, count: int) -> torch.Tensor:
        """The stream at the last `count` tokens of each prompt, [batch, count, d]."""
        return last_tokens(self.hidden, self.lengths.to(self.hidden.device), count)


class StreamedModel:
    """A model whose blocks are held one at a time, while all prompts pass through them.

    `for layer in streamed.blocks()` holds each block in turn, and `advance` takes a lane through it. At the end, within
    `head()`, `logits` are those of streams that have passed all blocks. `model` takes the hooks of `models.hooks` at
    the block that is held.
    """

    def __init__(self, parts: PartialModel) -> None:
        self.parts, self.model, self.stream = parts, parts.model, parts.stream
        self.device, self.dtype = parts.device, parts.dtype
        self._returned: Returned = bare
        self._noted = False

    @property
    def layer_count(self) -> int:
        return self.stream.layer_count

    @property
    def width(self) -> int:
        """The width of the residual stream."""
        return self.stream.architecture.width(self.stream.config)

    @torch.inference_mode()
    def enter(self, ids: Sequence[Sequence[int]], tokens: int = TOKENS_PER_BATCH) -> list[Lane]:
        """Lanes of prompts (token ids) at the input of the first block, in batches of at most `tokens` tokens.

        Raises:
            OrthogonalizeError: the blocks of this family do not stand one behind the other.
        """
        with self.parts.embedding(token for row in ids for token in row):
            if not self._noted:
                self._note_tuples(ids[0][:1])
            return [self._enter(group, [ids[i] for i in group]) for group in batches(ids, tokens)]

    def _note_tuples(self, ids: Sequence[int]) -> None:
        def note(returned: Returned) -> None:
            self._returned, self._noted = returned, True

        self.parts.hold(0)
        with noting_tuples(self.model, note), stopping_before(self.model, 1):
            self.stream.decoder(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False)

    def _enter(self, group: list[int], ids: Sequence[Sequence[int]]) -> Lane:
        padded, lengths = pad(ids, self.device)
        calls: list[_Call] = []
        streams: list[torch.Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, *rest = args or (kwargs.pop("hidden_states"),)
            if streams and hidden is not streams[0]:
                raise OrthogonalizeError(f"{self._name} changes the stream between its blocks; use --engine hf")
            state = next((key for key, value in kwargs.items() if _is_state(value)), None)
            if state is not None:
                raise OrthogonalizeError(f"the blocks of {self._name} share {state}; use --engine hf")
            calls.append(_Call(tuple(rest), kwargs))
            streams.append(hidden)
            return self._returned(hidden)

        with _replaced(self.stream, record), stopping_before(self.model, self.layer_count):
            self.stream.decoder(input_ids=padded, use_cache=False)
        if len(calls) != self.layer_count:
            raise OrthogonalizeError(f"{self._name} does not run its blocks in order; use --engine hf")
        return Lane(group, lengths, streams[0], calls)

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def blocks(self, first: int = 0) -> Generator[int]:
        """The layers from `first` on, each while its block is held; the next one is read meanwhile."""
        return self.parts.blocks(first)

    @torch.inference_mode()
    def advance(self, layer: int, lane: Lane) -> None:
        """Take a lane through block `layer`, which is held."""
        call = lane._calls[layer]
        output = self.stream.block(layer)(lane.hidden.to(self.device), *call.args, **call.kwargs)
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        lane.hidden = found.to(lane.hidden.device)

    @contextmanager
    def head(self) -> Iterator[None]:
        """Hold the output head in this context."""
        with self.parts.head():
            yield

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocabulary] in float32 of streams [n, d] that have passed all blocks, on the model's device."""
        embedding = self.model.get_input_embeddings()
        nothing = torch.zeros((), dtype=self.dtype, device=self.device)
        embedding.forward = lambda ids: nothing.expand(*ids.shape, embedding.embedding_dim)
        vocabulary = self.model.config.get_text_config().vocab_size
        found = []
        try:
            for part in torch.split(hidden, max(1, HEAD_NUMBERS // vocabulary)):
                stream = part.to(self.device).unsqueeze(1)
                output = self._returned(stream)
                ids = torch.zeros(len(part), 1, dtype=torch.long, device=self.device)
                with _replaced(self.stream, lambda *_args, output=output, **_kwargs: output):
                    found.append(self.model(input_ids=ids, use_cache=False).logits[:, 0].float())
        finally:
            del embedding.forward
        return torch.cat(found)


def _replaced(stream: Stream, forward: Any) -> AbstractContextManager[None]:
    """Let `forward` stand for the forward of every block in this context."""
    return replaced_forwards([stream.block(layer) for layer in range(stream.layer_count)], forward)


def _is_state(value: Any) -> bool:
    """Whether an argument of a block can carry what one block computes to later ones."""
    return isinstance(value, Mapping | list) or hasattr(value, "update")
