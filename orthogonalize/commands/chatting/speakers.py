"""The two sides of a chat: a base and its edit, with hooks, with weights swapped in one engine, or behind a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...checkpoints.checkpoint import RECIPE, open_checkpoint
from ...checkpoints.settings_files import context_length
from ...core.errors import InPlaceError, OrthogonalizeError
from ...core.progress import note
from ...data.chat import ChatFormat
from ...edits.bake import bake
from ...edits.config import EditConfig
from ...edits.recipe import load_recipe
from ...engines.base import EngineOptions, Ids
from ...engines.endpoint import Endpoint, EndpointClient, Message
from ...engines.registry import ENGINES, open_engine
from ...engines.shared_base import Weights
from ...engines.weight_swap import WeightSwap
from ...evals.shared_engine import base_weights
from ...models.hooks import intervened
from ...models.loading import load_tokenizer
from ...selection.resolve import intervention_of

ROOM = 8192  # tokens of a conversation in an engine that reserves memory for them


class Speaker(Protocol):
    """One side of a chat; `name` is base or edited, and `remote` says that it answers elsewhere, beside others."""

    @property
    def name(self) -> str: ...
    @property
    def remote(self) -> bool: ...

    def say(self, turns: Sequence[Message], max_new_tokens: int, show: Callable[[str], object]) -> str:
        """The answer to a conversation; `show` gets all of its text so far.

        Raises:
            OrthogonalizeError: there is none.
        """


class Streaming(Protocol):
    """The part of an engine that a chat uses."""

    def stream(self, prompt: Ids, max_new_tokens: int, show: Callable[[list[int]], object]) -> list[int]: ...


@dataclass(frozen=True)
class LocalSpeaker:
    """A model in this process; in the context of `ready`, `engine` holds it."""

    name: str
    chat: ChatFormat
    engine: Streaming
    ready: Callable[[], AbstractContextManager[object]]
    room: int | None
    remote: bool = False

    def say(self, turns: Sequence[Message], max_new_tokens: int, show: Callable[[str], object]) -> str:
        prompt = self.chat.encode_turns(turns)
        if self.room is not None and len(prompt) + max_new_tokens > self.room:
            raise OrthogonalizeError(
                f"the conversation has {len(prompt)} tokens, and with an answer of {max_new_tokens} does not fit into "
                f"{self.room}; begin a new one with /new, or set --max-new-tokens lower"
            )
        with self.ready():
            return self._text(self.engine.stream(prompt, max_new_tokens, lambda ids: show(self._text(ids))))

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.chat.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character of several tokens, of which not all are there yet


@dataclass(frozen=True)
class RemoteSpeaker:
    """A model behind an endpoint, which is told `system` before every conversation, if anything."""

    name: str
    client: EndpointClient
    system: str | None = None
    remote: bool = True

    def say(self, turns: Sequence[Message], max_new_tokens: int, show: Callable[[str], object]) -> str:
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.client.stream([*told, *turns], max_new_tokens, show)


Formats = Callable[[Any], ChatFormat]
"""Makes the chat format of a tokenizer."""


@dataclass(frozen=True)
class Local:
    """How models are run in this process."""

    engine: str
    options: EngineOptions
    formats: Formats

    @contextmanager
    def opened(self, folder: Path) -> Iterator[tuple[Any, ChatFormat, int | None]]:
        """An engine on a checkpoint, its chat format, and the most tokens of a conversation.

        Raises:
            OrthogonalizeError: it cannot stream, or does not start.
        """
        chat = self.formats(load_tokenizer(folder))
        declared = context_length(open_checkpoint(folder).config)
        with open_engine(self.engine, folder, chat.tokenizer, min(declared or ROOM, ROOM), self.options) as running:
            if not hasattr(running, "stream"):
                raise OrthogonalizeError(f"--engine {self.engine} cannot show answers as they are written; use hf")
            yield running, chat, declared if ENGINES[self.engine].hooks else min(declared or ROOM, ROOM)


@contextmanager
def one_model(local: Local, folder: Path, name: str = "edited") -> Iterator[list[Speaker]]:
    """A single model, without another to compare it with."""
    with local.opened(folder) as (engine, chat, room):
        yield [LocalSpeaker(name, chat, engine, nullcontext, room)]


@contextmanager
def hooked(local: Local, folder: Path, run: Path, config: EditConfig) -> Iterator[list[Speaker]]:
    """A base, and the edit that hooks make of it, which is the one that weights would be given.

    Raises:
        OrthogonalizeError: the run is of another model.
    """
    intervention = intervention_of(folder, run, config, device=local.options.device)
    with local.opened(folder) as (engine, chat, room):
        model = engine.model

        def with_hooks() -> AbstractContextManager[object]:
            return intervened(model, intervention, renormalise=False)

        yield [
            LocalSpeaker("base", chat, engine, nullcontext, room),
            LocalSpeaker("edited", chat, engine, with_hooks, room),
        ]


@contextmanager
def swapped(local: Local, checkpoint: Path, base: Path) -> Iterator[list[Speaker]]:
    """A base and its edited checkpoint in one engine, whose weights are swapped in place.

    Where that is not possible, transformers holds both.

    Raises:
        OrthogonalizeError: it is not, and the engine has no memory for two.
    """
    with ExitStack() as stack:
        weights = _different(checkpoint, base)
        why = "their tensors or settings differ otherwise"
        if weights is not None:
            engine, chat, room = stack.enter_context(local.opened(checkpoint))
            swap = WeightSwap(engine, open_checkpoint(checkpoint))
            lacking = _lacking(swap, weights)
            if lacking is None:
                yield _swapping(swap, weights, engine, chat, room)
                return
            why = lacking
            stack.close()
        if not ENGINES[local.engine].hooks:
            raise OrthogonalizeError(f"this engine cannot swap weights in place ({why}); use --engine hf")
        note(f"the weights cannot be swapped in place ({why}), so both models are in memory")
        (before,) = stack.enter_context(one_model(local, base, "base"))
        (after,) = stack.enter_context(one_model(local, checkpoint))
        yield [before, after]


def _different(checkpoint: Path, base: Path) -> Weights | None:
    """The base's weights under the checkpoint's names, without those that the recipe says are the same."""
    weights = base_weights(checkpoint, base)
    if weights is None or not (checkpoint / RECIPE).is_file():
        return weights
    plan = bake(open_checkpoint(base), load_recipe(checkpoint).intervention()).checkpoint
    changed = plan.touched | plan.additions.keys()
    return {name: make for name, make in weights.items() if name in changed}


def _lacking(swap: WeightSwap, weights: Weights) -> str | None:
    try:
        return swap.first_unswappable(weights)
    except InPlaceError as error:
        return str(error)


def _swapping(
    swap: WeightSwap, weights: Weights, engine: Streaming, chat: ChatFormat, room: int | None
) -> list[Speaker]:
    held = ["edited"]

    def holding(name: str) -> AbstractContextManager[object]:
        if held != [name]:
            swap.apply(weights if name == "base" else {})
            held[:] = [name]
        return nullcontext()

    return [LocalSpeaker(name, chat, engine, lambda name=name: holding(name), room) for name in ("base", "edited")]  # type: ignore[misc]


@contextmanager
def served(endpoints: Sequence[str], system: str | None) -> Iterator[list[Speaker]]:
    """The models behind one endpoint, or two, of which the first is the edited one.

    Raises:
        OrthogonalizeError: one of them cannot be asked.
    """
    with ExitStack() as stack:
        found: list[Speaker] = []
        for name, text in zip(("edited", "base"), endpoints, strict=False):
            client = stack.enter_context(EndpointClient(Endpoint.parse(text)))
            found.insert(0, RemoteSpeaker(name, client, system))
        yield found
