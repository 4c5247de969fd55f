"""A chat with one model or two: what is typed, what is answered, and what is kept of both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ...core.errors import OrthogonalizeError
from ...core.files import write_atomically
from ...data.thoughts import without_thought
from ...engines.endpoint import Message
from .screen import Screen, Update
from .speakers import Speaker

SAVED = Path("chat.jsonl")
HELP = "/next: the next prompt, in a new conversation; /new: a new conversation; /save [FILE]; /quit"


@dataclass
class Exchange:
    """A prompt and its answers by side; conversations and their turns count from 1."""

    conversation: int
    turn: int
    prompt: str
    answers: dict[str, str]

    def row(self) -> str:
        """The exchange as one line of JSON."""
        place = {"conversation": self.conversation, "turn": self.turn, "prompt": self.prompt}
        return json.dumps(place | self.answers, ensure_ascii=False)


@dataclass
class Session:
    """A chat, in which every side remembers its own answers.

    Attributes:
        speakers: the sides.
        screen: where answers are shown.
        max_new_tokens: of every answer.
        prompts: what `/next` asks, one after another.
        file: where every exchange is stored as soon as it is complete; None stores only on `/save`.
    """

    speakers: Sequence[Speaker]
    screen: Screen
    max_new_tokens: int
    prompts: Iterator[str]
    file: Path | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    _histories: list[list[Message]] = field(default_factory=list)
    _conversation: int = 1
    _own: set[Path] = field(default_factory=set)  # files that this session has written, and may write again

    def __post_init__(self) -> None:
        self._histories = [[] for _ in self.speakers]
        if self.file is not None:
            self.check_new(self.file)

    def run(self, read: Callable[[], str | None]) -> None:
        """Answer what `read` gives, until it gives None or `/quit`."""
        while (line := read()) is not None:
            try:
                if not self.take(line.strip()):
                    return
            except OrthogonalizeError as error:  # one answer failed, or one file: the chat goes on
                self.screen.line(f"error: {error}")

    def take(self, line: str) -> bool:
        """Do what a line says; False ends the chat."""
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/q", "/exit"):
            return False
        if word in ("/next", "/n"):
            self.next()
        elif word == "/new":
            self.begin()
        elif word in ("/save", "/s"):
            self.save(Path(rest.strip()) if rest.strip() else self.file or SAVED)
        elif line.startswith("/"):
            self.screen.line(HELP)
        elif line:
            self.ask(line)
        return True

    def begin(self) -> None:
        """Begin a new conversation; nothing is remembered of the one before."""
        if any(self._histories):
            self._conversation += 1
        self._histories = [[] for _ in self.speakers]

    def next(self) -> None:
        """Ask the next prompt in a new conversation."""
        prompt = next(self.prompts, None)
        if prompt is None:
            self.screen.line("there is no further prompt; --prompts, --run and --report bring some")
            return
        self.begin()
        self.screen.line(f"> {prompt}")
        self.ask(prompt)

    def ask(self, prompt: str) -> None:
        """Show every side's answer to a prompt after what it has said so far.

        Raises:
            OrthogonalizeError: a side does not answer; the prompt is then forgotten by all.
        """
        asked: Message = {"role": "user", "content": prompt}
        with self.screen.answers() as update:
            answers = self._answers([[*history, asked] for history in self._histories], update)
        for history, answer in zip(self._histories, answers, strict=True):
            history += [asked, {"role": "assistant", "content": without_thought(answer) or answer}]
        by_side = {speaker.name: answer for speaker, answer in zip(self.speakers, answers, strict=True)}
        self.exchanges.append(Exchange(self._conversation, len(self._histories[0]) // 2, prompt, by_side))
        if self.file is not None:
            self._write(self.file)

    def _answers(self, chats: Sequence[Sequence[Message]], update: Update) -> list[str]:
        """Every side's answer: servers answer at the same time, models in this process one after another."""

        def say(side: int) -> str:
            answer = self.speakers[side].say(chats[side], self.max_new_tokens, partial(update, side))
            update(side, answer)
            return answer

        if not any(speaker.remote for speaker in self.speakers):
            return [say(side) for side in range(len(self.speakers))]
        pool = ThreadPoolExecutor(len(self.speakers))
        try:
            return list(pool.map(say, range(len(self.speakers))))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C, no answer is waited for

    def check_new(self, file: Path) -> None:
        """Reject a file that others have written.

        Raises:
            OrthogonalizeError: it exists.
        """
        if file.resolve() not in self._own and (file.exists() or file.is_symlink()):
            raise OrthogonalizeError(f"{file} already exists; save to another file")

    def save(self, file: Path) -> None:
        """Write all exchanges so far, one line of JSON each.

        Raises:
            OrthogonalizeError: the file is somebody else's, or cannot be written.
        """
        if not self.exchanges:
            self.screen.line("nothing was said yet")
            return
        self._write(file)
        self.screen.line(f"saved: {file}")

    def _write(self, file: Path) -> None:
        self.check_new(file)
        try:
            write_atomically(file, "".join(exchange.row() + "\n" for exchange in self.exchanges))
        except OSError as error:
            raise OrthogonalizeError(f"{file} cannot be written: {error.strerror}") from error
        self._own.add(file.resolve())
