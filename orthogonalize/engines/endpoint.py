"""A model behind an OpenAI-compatible server: its chat completions, whole or streamed.

A request that is refused for a moment (rate limits, errors of the server), cut off or answered with something
unreadable is sent again, with growing pauses. The key comes from the environment; it is in no message, and only ever in
the requests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

from ..core.errors import OrthogonalizeError, first_line, shown
from ..core.progress import track

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
Message = dict[str, str]  # `role` and `content`

KEY = "ORTHOGONALIZE_API_KEY"
OPENAI_KEY = "OPENAI_API_KEY"  # sent to OpenAI alone
OPENAI = "api.openai.com"
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt
LONGEST_WAIT = 60.0  # seconds that a server may ask for between two attempts
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
REJECTED = frozenset({400, 413, 422})
CONNECT, READ = 10.0, 300.0  # seconds
NOBODY = "nobody waits for the answer any more"
CONCURRENT = 8  # requests at a time


class _PassingError(Exception):
    """A failure that may be gone at the next attempt; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class RejectedError(OrthogonalizeError):
    """The server does not take this one request: it is too long, or filtered."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served.

    Attributes:
        url: the address that ends before `/chat/completions`, without a name or password.
        model: what the server calls the model; empty for the only one that it serves.
        key: sent with every request; never shown.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """The endpoint that `URL#MODEL` or `URL` names, with the key that the environment has for it.

        Raises:
            OrthogonalizeError: it is not an address of a server, or has a name and a password in it.
        """
        address, _, model = text.partition("#")
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise OrthogonalizeError(f"endpoint {text!r} is not of the form http://HOST:PORT/v1#MODEL")
        if "@" in parts.netloc:
            raise OrthogonalizeError(f"endpoint {text!r} has a password in it; leave it out, and set {KEY}")
        path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        key = os.environ.get(KEY) or (os.environ.get(OPENAI_KEY) if parts.hostname == OPENAI else None)
        return cls(f"{parts.scheme}://{parts.netloc}{path}", model, key or None)


class EndpointClient:
    """Asks an endpoint; as a context manager, it also finds out what the model is called if no name is given."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.http: httpx.Client | None = None
        self._closed = Event()
        self._length, self._greedy = "max_tokens", True  # what OpenAI's reasoning models have instead, and refuse

    def __enter__(self) -> Self:
        import httpx

        headers = {} if self.endpoint.key is None else {"Authorization": f"Bearer {self.endpoint.key}"}
        limits = httpx.Limits(max_connections=CONCURRENT)
        self.http = httpx.Client(headers=headers, timeout=httpx.Timeout(READ, connect=CONNECT), limits=limits)
        try:
            if not self.endpoint.model:
                self.endpoint = replace(self.endpoint, model=self._only_model())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        if self.http is not None:
            self.http.close()
        self.http = None

    def answer(self, messages: Sequence[Message], max_new_tokens: int) -> str:
        """The greedy answer to a chat.

        Raises:
            OrthogonalizeError: the server refuses, or fails again and again.
        """
        return self._again(lambda: self._complete(messages, max_new_tokens))

    def answers(self, chats: Sequence[Sequence[Message]], max_new_tokens: int, activity: str) -> list[str | None]:
        """The answers to several chats, of which `CONCURRENT` are asked at a time; `activity` names the work.

        A chat that the server rejects, which may be too long or filtered, has None.
        """

        def ask(chat: Sequence[Message]) -> str | None:
            try:
                return self.answer(chat, max_new_tokens)
            except RejectedError:
                return None

        pool = ThreadPoolExecutor(CONCURRENT)
        with track(activity, len(chats), "answers") as advance:
            asked = [pool.submit(ask, chat) for chat in chats]
            found = []
            try:
                for each in asked:
                    found.append(each.result())
                    advance(1)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # nothing that is under way is waited for after Ctrl-C
        return found

    def stream(self, messages: Sequence[Message], max_new_tokens: int, show: Callable[[str], object]) -> str:
        """As `answer`; `show` gets all of the text so far, whenever there is more."""
        return self._again(lambda: self._streamed(messages, max_new_tokens, show))

    def _again(self, action: Callable[[], T]) -> T:
        for wait in (*WAITS, None):
            try:
                return action()
            except _PassingError as error:
                if wait is None:
                    raise self._failed(f"{error}, {len(WAITS) + 1} times; try again later") from error
                if self._closed.wait(wait if error.wait is None else min(error.wait, LONGEST_WAIT)):
                    raise self._failed(NOBODY) from error
        raise AssertionError  # the last attempt returns or raises

    def _failed(self, reason: str) -> OrthogonalizeError:
        key = self.endpoint.key
        said = reason if key is None else reason.replace(key, "***")
        return OrthogonalizeError(f"endpoint {self.endpoint.url}: {said}")

    def _only_model(self) -> str:
        listed = self._again(lambda: self._models())
        if len(listed) == 1:
            return listed[0]
        have = ", ".join(shown(name, 80) for name in listed[:8]) or "none"
        raise self._failed(f"name one of the models that it serves, as in URL#MODEL ({have})")

    def _models(self) -> list[str]:
        with self._request("GET", "/models") as response:
            response.read()
            with _readable():
                return [str(each["id"]) for each in response.json()["data"]]

    def _body(self, messages: Sequence[Message], max_new_tokens: int, stream: bool) -> dict[str, Any]:
        greedy = {"temperature": 0} if self._greedy else {}
        body = {"model": self.endpoint.model, "messages": list(messages), self._length: max_new_tokens}
        return {**body, **greedy, "stream": stream}

    def _complete(self, messages: Sequence[Message], max_new_tokens: int) -> str:
        with self._request("POST", "/chat/completions", self._body(messages, max_new_tokens, False)) as response:
            response.read()
            with _readable():
                return _content(response.json()["choices"][0]["message"])

    def _streamed(self, messages: Sequence[Message], max_new_tokens: int, show: Callable[[str], object]) -> str:
        text, ended = "", False
        with self._request("POST", "/chat/completions", self._body(messages, max_new_tokens, True)) as response:
            for line in response.iter_lines():
                event = line.removeprefix("data:").strip()
                if not line.startswith("data:") or not event:
                    continue
                if event == "[DONE]":
                    ended = True
                    break
                with _readable():
                    choices = json.loads(event)["choices"]
                    piece = _content(choices[0]["delta"]) if choices else ""
                    ended = ended or bool(choices and choices[0].get("finish_reason"))
                if piece:
                    text += piece
                    show(text)
        if not ended:
            raise _PassingError("the answer was cut off")
        return text

    @contextmanager
    def _request(self, method: str, path: str, body: Any = None) -> Iterator[httpx.Response]:
        """The response to a request, whose body is not read yet.

        Raises:
            _PassingError: it may work at the next attempt.
            OrthogonalizeError: it will not.
        """
        import httpx

        if self.http is None:
            raise self._failed(NOBODY)
        try:
            with self.http.stream(method, self.endpoint.url + path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    self._check(response)
                yield response
        except httpx.TransportError as error:
            raise _PassingError(f"no answer ({first_line(error)})") from error
        except httpx.HTTPError as error:
            raise self._failed(first_line(error)) from error

    def _check(self, response: httpx.Response) -> None:
        status = response.status_code
        if status in PASSING:
            raise _PassingError(f"status {status}", _wait_of(response))
        if status in (401, 403):  # such servers quote the key
            sent = "the key is not accepted" if self.endpoint.key else "it wants a key"
            raise self._failed(f"{sent} (status {status}); set {KEY}")
        if status == 404:
            raise self._failed(f"it has no {self.endpoint.model or 'list of models'} there; check URL#MODEL")
        if status in REJECTED:
            self._adapt(response.text)
            raise RejectedError(str(self._failed(f"status {status}: {shown(response.text)}")))
        raise self._failed(f"status {status}: {shown(response.text)}")

    def _adapt(self, said: str) -> None:
        """Leave out what a model does not take.

        Raises:
            _PassingError: something was left out, so that the next attempt may work.
        """
        if self._length == "max_tokens" and "max_completion_tokens" in said:
            self._length = "max_completion_tokens"
        elif self._greedy and "temperature" in said:
            self._greedy = False
        else:
            return
        raise _PassingError("it takes no such setting", wait=0.0)


def _content(message: Any) -> str:
    """The text of a message or of a piece of one; none is an empty text."""
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise TypeError("content is no text")
    return content or ""


@contextmanager
def _readable() -> Iterator[None]:
    """What is not as expected in a reply is a passing failure: proxies answer with pages of their own."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _PassingError("a reply that is no chat completion") from error


def _wait_of(response: httpx.Response) -> float | None:
    """The seconds that the server asks to wait for."""
    stated = response.headers.get("Retry-After", "")
    return float(stated) if stated.isdecimal() else None
