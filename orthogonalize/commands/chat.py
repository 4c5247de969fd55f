"""`chat`: talk to a base and its edit, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import RECIPE
from ..core.errors import OrthogonalizeError
from ..core.progress import note
from ..data.chat import ChatFormat
from ..data.prompts import Source, load_prompts
from ..data.thoughts import Thinking
from ..edits.recipe import load_recipe
from ..engines.base import ONE_DEVICE, EngineOptions
from ..engines.registry import ENGINES, check_engine
from ..evals.shared_engine import check_pair
from ..models.names import public_name
from ..models.resolve import find_model
from ..reports.schema import load_report
from ..selection.resolve import choose, pick_edit
from ..selection.run_folder import Run, load_run
from .chatting.screen import Screen
from .chatting.session import HELP, Session
from .chatting.speakers import Local, Speaker, hooked, one_model, served, swapped
from .merge import checkpoint_of

ANSWER = 256  # tokens


@dataclass(frozen=True)
class Talk:
    """Whom to talk to, and how.

    Attributes:
        base: the model that was edited; by default the recipe's, or the run's.
        run: a folder of `extract`. Without a checkpoint, its edit is made with hooks; with one, it only brings prompts
            and how they are presented.
        pick: the number of the edit of `run`; None is the best.
        endpoints: one or two addresses `URL#MODEL` of OpenAI-compatible servers, the edited model's first.
        prompts: a source of prompts to ask.
        report: a folder of `eval`, whose prompts to ask.
        engine: `hf`, or `vllm`.
        options: where the engine runs.
        max_new_tokens: of every answer.
        system: a system prompt; by default the run's.
        thinking: what becomes of thoughts before answers, if there is no run (see `ChatFormat.thinking`).
        save: the file where every exchange is stored.
    """

    base: str | None = None
    run: Path | None = None
    pick: int | None = None
    endpoints: Sequence[str] = ()
    prompts: Source | None = None
    report: Path | None = None
    engine: str = "hf"
    options: EngineOptions = ONE_DEVICE
    max_new_tokens: int = ANSWER
    system: str | None = None
    thinking: Thinking = "off"
    save: Path | None = None

    def check(self, checkpoint: object | None) -> None:
        """Reject what does not fit together.

        Raises:
            OrthogonalizeError: the message says what.
        """
        if self.endpoints and (checkpoint is not None or self.base is not None):
            raise OrthogonalizeError("--endpoint is a model that runs elsewhere; leave out CHECKPOINT and --base")
        if len(self.endpoints) > 2:
            raise OrthogonalizeError("give --endpoint once, or twice: the edited model's first, then the base's")
        if not self.endpoints and checkpoint is None and self.run is None:
            raise OrthogonalizeError("whom to talk to? give CHECKPOINT, --run RUN (hooks) or --endpoint URL")
        with_hooks = self.run is not None and checkpoint is None and not self.endpoints
        if self.pick is not None and not with_hooks:
            raise OrthogonalizeError("--pick makes an edit of --run with hooks; leave out CHECKPOINT and --endpoint")
        if not self.endpoints:
            check_engine(self.engine, self.options)
        if with_hooks and not ENGINES[self.engine].hooks:
            raise OrthogonalizeError(
                f"--engine {self.engine} takes no hooks; use --engine hf, or edit and give CHECKPOINT"
            )
        if self.endpoints and self.system is None and self.run is not None:
            note("the server's own chat template is used, without the run's system prompt")


def chat(checkpoint: Path | str | None, talk: Talk, read: Callable[[], str | None], screen: Any = None) -> Session:
    """Talk to a base and its edit, both of whose answers are greedy and are shown while they are written.

    Args:
        checkpoint: an edited checkpoint or adapter; None for hooks or endpoints.
        read: the next line of the user; None ends the chat.
        screen: a rich console; by default the terminal.

    Raises:
        OrthogonalizeError: a model, run, file or server cannot be used.
    """
    talk.check(checkpoint)
    run = None if talk.run is None else load_run(talk.run)
    prompts = list(_prompts(talk, run))
    with _speakers(checkpoint, talk, run) as speakers:
        shown = Screen([speaker.name for speaker in speakers], screen)
        session = Session(speakers, shown, talk.max_new_tokens, iter(prompts), talk.save)
        shown.line(f"{HELP} ({len(prompts)} prompts)")
        session.run(read)
    return session


def _prompts(talk: Talk, run: Run | None) -> Iterator[str]:
    """The prompts that `/next` asks: your own, or a report's, or the run's test prompts of both sides in turn."""
    if talk.prompts is not None:
        yield from (prompt.text for prompt in load_prompts(talk.prompts))
    elif talk.report is not None:
        yield from dict.fromkeys(answer.prompt for answer in load_report(talk.report).answers)
    elif run is not None:
        pairs = zip_longest(run.texts(run.target_side, "test"), run.texts("negative", "test"))
        yield from (text for text in chain.from_iterable(pairs) if text is not None)


def _speakers(checkpoint: Path | str | None, talk: Talk, run: Run | None) -> AbstractContextManager[list[Speaker]]:
    if talk.endpoints:
        return served(talk.endpoints, talk.system)
    local = Local(talk.engine, talk.options, _formats(talk, run))
    if checkpoint is None:
        assert run is not None
        assert talk.run is not None
        config = choose(run) if talk.pick is None else pick_edit(run, talk.pick, {})
        model = talk.base or run.info.model
        note(f"{public_name(model)} with hooks: {config.describe()}")
        return hooked(local, find_model(model, None if talk.base else run.info.revision), talk.run, config)
    folder = checkpoint_of(checkpoint, talk.base)
    base = _base_of(folder, talk.base)
    if base is None:
        return one_model(local, folder)
    check_pair(folder, base)
    return swapped(local, folder, base)


def _base_of(folder: Path, given: str | None) -> Path | None:
    """The base of a checkpoint: the one given, or that of its recipe; None if that is not to be had."""
    if given is not None:
        return find_model(given)
    if not (folder / RECIPE).is_file():
        note(f"{folder} has no recipe, which would name its base; --base shows that beside it")
        return None
    named = load_recipe(folder).base
    try:
        return find_model(named.model, named.revision)
    except OrthogonalizeError as error:
        note(f"the base is not shown: {error}; name it with --base")
        return None


def _formats(talk: Talk, run: Run | None) -> Callable[[Any], ChatFormat]:
    def of(tokenizer: Any) -> ChatFormat:
        if run is not None:
            found = run.info.chat_format(tokenizer)
            system = found.system if talk.system is None else talk.system
            return ChatFormat(tokenizer, system, found.arguments, found.templated, found.thinking)
        templated = bool(tokenizer.chat_template)
        if not templated:
            note("the model has no chat template, so it goes on from the bare text")
        return ChatFormat(tokenizer, talk.system, {}, templated, talk.thinking)

    return of
