"""Push batches of prompts through a model one block at a time, instead of the model past one batch at a time.

What a block receives besides the stream (masks, rotary embeddings, positions) is not worked out per family: the text
model's own forward pass runs once per batch with every block replaced by a recorder of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import Event
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
        replica: the model that it passes through, on one of the devices.
    """

    rows: list[int]
    lengths: torch.Tensor
    hidden: torch.Tensor
    replica: PartialModel
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

    On several devices, each takes its own lanes through a replica of the block, in a thread of its own; lanes are
    the same as on one device, and so are their streams. `model` and the head are on the first.
    """

    def __init__(self, parts: PartialModel) -> None:
        self.parts, self.model, self.stream = parts, parts.model, parts.stream
        self.device, self.dtype, self.replicas = parts.device, parts.dtype, parts.replicas
        self._returned: Returned = bare
        self._noted = False
        self._stopping = Event()

    @property
    def layer_count(self) -> int:
        return self.stream.layer_count

    @property
    def width(self) -> int:
        """The width of the residual stream."""
        return self.stream.architecture.width(self.stream.config)

    @torch.inference_mode()
    def enter(
        self,
        sets: Sequence[Sequence[Sequence[int]]],
        tokens: int = TOKENS_PER_BATCH,
        streams: Sequence[int] | None = None,
    ) -> list[list[Lane]]:
        """Lanes of sets of prompts (token ids) at the input of the first block.

        Each goes to the device that has the least to compute so far.

        Args:
            tokens: at most so many are in a lane.
            streams: how many streams of each set are going to pass through the blocks.

        Raises:
            OrthogonalizeError: the blocks of this family do not stand one behind the other.
        """
        loads = [0] * len(self.replicas)
        found: list[list[Lane]] = []
        with self.parts.embedding(token for ids in sets for row in ids for token in row):
            if not self._noted:
                self._note_tuples(sets[0][0][:1])
            for ids, count in zip(sets, streams or [1] * len(sets), strict=True):
                found.append([])
                for group in batches(ids, tokens):
                    least = loads.index(min(loads))
                    loads[least] += count * len(group) * max(len(ids[i]) for i in group)
                    found[-1].append(self._enter(group, [ids[i] for i in group], self.replicas[least]))
        return found

    def _note_tuples(self, ids: Sequence[int]) -> None:
        def note(returned: Returned) -> None:
            self._returned, self._noted = returned, True

        self.parts.hold(0)
        with noting_tuples(self.model, note), stopping_before(self.model, 1):
            self.stream.decoder(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False)

    def _enter(self, group: list[int], ids: Sequence[Sequence[int]], replica: PartialModel) -> Lane:
        padded, lengths = pad(ids, replica.device)
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

        with _replaced(replica.stream, record), stopping_before(replica.model, self.layer_count):
            replica.stream.decoder(input_ids=padded, use_cache=False)
        if len(calls) != self.layer_count:
            raise OrthogonalizeError(f"{self._name} does not run its blocks in order; use --engine hf")
        return Lane(group, lengths, streams[0], replica, calls)

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def blocks(self, first: int = 0) -> Generator[int]:
        """The layers from `first` on, each while its block is held; the next one is read meanwhile."""
        return self.parts.blocks(first)

    @torch.inference_mode()
    def advance(self, layer: int, lane: Lane) -> None:
        """Take a lane through block `layer`, which is held."""
        call, replica = lane._calls[layer], lane.replica
        output = replica.stream.block(layer)(lane.hidden.to(replica.device), *call.args, **call.kwargs)
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        lane.hidden = found.to(lane.hidden.device)

    def on_every_device(self, work: Callable[[PartialModel], None]) -> None:
        """Call `work` with the replica of every device, on all of them at a time.

        Raises:
            Exception: what `work` raises; the other devices then stop before their next lane.
        """
        if len(self.replicas) == 1:
            work(self.replicas[0])
            return

        def on(replica: PartialModel) -> None:
            with torch.cuda.device(replica.device) if replica.device.type == "cuda" else nullcontext():
                work(replica)

        self._stopping.clear()
        with ThreadPoolExecutor(len(self.replicas)) as threads:
            try:
                working = [threads.submit(on, replica) for replica in self.replicas]
                wait(working, return_when=FIRST_EXCEPTION)
                for each in working:
                    if each.done():
                        each.result()
            except BaseException:  # Ctrl-C too, which arrives here
                self._stopping.set()
                raise

    def advance_all(self, layer: int, lanes: Iterable[Lane]) -> None:
        """Take lanes through block `layer`, each on its device."""
        every = list(lanes)
        self.on_every_device(lambda replica: self.advance_own(layer, every, replica))

    def advance_own(self, layer: int, lanes: Iterable[Lane], replica: PartialModel) -> None:
        """Take those of the lanes that are on the device of `replica` through block `layer`."""
        for lane in self.own(lanes, replica):
            self.advance(layer, lane)

    def own(self, lanes: Iterable[Lane], replica: PartialModel) -> Iterator[Lane]:
        """Those of the lanes that are on the device of `replica`, until another device has stopped."""
        for lane in lanes:
            if self._stopping.is_set():
                raise CancelledError
            if lane.replica is replica:
                yield lane

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
