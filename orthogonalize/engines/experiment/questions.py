"""What only a server can tell about a description: whether it runs an untied head, and which biases it reads.

A parameter of a small random model is filled with NaN. If the server's log-probabilities become NaN, it reads the
parameter; if they stay as they were, it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from ...architectures.open_questions import HEAD, Answer, parts_with_bias
from ...architectures.schema import bias_name
from ...core.errors import OrthogonalizeError
from ...models.sites import Sites

QUESTIONS = "questions.json"  # in the folder of the model that they are about
PROMPTS = torch.randint(3, 80, (16, 17), generator=torch.Generator().manual_seed(1)).tolist()
Served = Literal["vllm", "transformers"]  # vLLM's own class for a model, or its Transformers backend


@dataclass(frozen=True)
class Question:
    """Whether a server reads some tensors of a checkpoint.

    Attributes:
        name: `head`, or the kind and key of the part whose bias it is, such as `mlp.dense`.
        tensors: those that it has to read, every one.
        created: all that `settings` create.
        settings: the configuration of a checkpoint that has them.
        without: the configuration of one that does not.
    """

    name: str
    tensors: tuple[str, ...]
    created: tuple[str, ...]
    settings: Mapping[str, Any]
    without: Mapping[str, Any]

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Question:
        """The question that was stored as JSON."""
        tensors, created = tuple(stored["tensors"]), tuple(stored["created"])
        return cls(stored["name"], tensors, created, stored["settings"], stored["without"])


class OtherModelError(OrthogonalizeError):
    """A server runs a model, but computes something else than transformers."""


class InconclusiveError(OrthogonalizeError):
    """An experiment did not work, so it shows nothing."""


class PassingError(InconclusiveError):
    """An experiment did not work for want of memory, time or the like, so that it may work another time."""


@dataclass(frozen=True)
class Told:
    """What a server told.

    Attributes:
        answers: by question.
        reason: why there is none to the other questions, if there are others.
        passing: whether it is one that may pass, so that the same experiment may work another time.
    """

    answers: Mapping[str, Answer]
    reason: str = ""
    passing: bool = False


class Server(Protocol):
    """A model that is served, and whose weights can be changed."""

    def is_number(self) -> bool:
        """Whether its log-probabilities are numbers, with the weights that it started on."""

    def reads(self, tensor: str) -> bool:
        """Whether its log-probabilities become NaN with `tensor`.

        Raises:
            InconclusiveError: the experiment did not work, so it shows nothing.
        """


class Start(Protocol):
    """Starts one implementation on the model with what `stored` is about alone, and with NaN in the tensors `spoiled`.

    Raises:
        OtherModelError: it computes something else than transformers.
        PassingError: memory, time or the like was short.
        OrthogonalizeError: it does not start.
    """

    def __call__(
        self, served: Served, stored: Sequence[Question], spoiled: Sequence[str]
    ) -> AbstractContextManager[Server]:
        """The running server, until the context ends."""


def open_questions(sites: Sites) -> list[Question]:
    """The questions that the description of a twin leaves open, as far as the twin has the tensors.

    The twin's head is untied, and its configuration has the `open_flags`.
    """
    architecture, found = sites.architecture, list[Question]()
    if architecture.head.untied == "unknown" and sites.head in sites.tensors:
        untied, tied = (dict.fromkeys(architecture.head.flags, value) for value in (False, True))
        found.append(Question(HEAD, (sites.head,), (sites.head,), untied, tied))
    for name, (part, bias) in parts_with_bias(architecture).items():
        if bias.served != "unknown":
            continue
        read, made = list[str](), list[str]()
        for layer in range(architecture.layers(sites.config)):
            stored = [bias_name(write.name) for write in sites.writes(part, layer, bias.on)]
            read += stored
            made += [*stored, *(bias_name(sites.in_layer(zero, layer)) for zero in bias.zeros)]
        if read and all(tensor in sites.tensors for tensor in read):
            created = tuple(tensor for tensor in made if bias.flags and tensor in sites.tensors)
            without = {flag: not value for flag, value in bias.flags.items()}
            found.append(Question(name, tuple(read), created, bias.flags, without))
    return found


def ask(
    questions: Sequence[Question],
    start: Start,
    known: Mapping[str, Answer] | None = None,
    tell: Callable[[Mapping[str, Answer]], object] = lambda _: None,
    backend: bool = True,
) -> Told:
    """The answers to all questions, those that are `known` included.

    vLLM's own class comes first; its Transformers backend is asked for what that does not read, unless the model has no
    use for the `backend`. `tell` is given the answers whenever there are more.
    """
    found = dict(known or {})
    failures: list[str] = []
    asks: dict[Served, Callable[..., set[str]]] = {"vllm": _read_by_class}
    if backend:
        asks["transformers"] = _read_at_once
    for served, read_by in asks.items():
        left = [question for question in questions if question.name not in found]
        try:
            read = read_by(served, questions, left, start) if left else set()
        except OtherModelError:  # whatever it reads, it cannot serve the model
            read = set()
        except PassingError as error:  # answers must not depend on it
            return Told(found, str(error), passing=True)
        except OrthogonalizeError as error:
            failures.append(str(error))
            continue
        found |= dict.fromkeys(read, served)
        tell(found)
    left = [question for question in questions if question.name not in found]
    if not failures:
        found |= {question.name: "never" for question in left}
    return Told(found, failures[0] if left and failures else "")


def _read_by_class(served: Served, every: Sequence[Question], asked: Sequence[Question], start: Start) -> set[str]:
    """As `_read_at_once`, or one by one: a class may refuse a checkpoint for a tensor that it does not know.

    Raises:
        InconclusiveError: an experiment shows nothing.
        OrthogonalizeError: it does not run the model even without any of the tensors.
    """
    found = _unless_refused(served, every, asked, start)
    if found is not None:
        return found
    _read_at_once(served, [], [], start)
    alone = [_unless_refused(served, [each], [each], start) for each in asked] if len(every) > 1 else []
    return {name for names in alone if names is not None for name in names}


def _unless_refused(
    served: Served, stored: Sequence[Question], asked: Sequence[Question], start: Start
) -> set[str] | None:
    """As `_read_at_once`; None if the model is refused, perhaps for a tensor that the implementation does not know.

    Raises:
        InconclusiveError: an experiment shows nothing.
    """
    try:
        return _read_at_once(served, stored, asked, start)
    except InconclusiveError:
        raise
    except OrthogonalizeError:
        return None


def _read_at_once(served: Served, stored: Sequence[Question], asked: Sequence[Question], start: Start) -> set[str]:
    """The names of those of `asked` whose tensors one implementation reads, in a model that has those of `stored`.

    Raises:
        OrthogonalizeError: it does not run that model.
    """
    with start(served, stored, ()) as server:
        ignored = {q.name: [tensor for tensor in q.tensors if not server.reads(tensor)] for q in asked}

    def reads(tensors: Sequence[str]) -> bool:
        with start(served, stored, tensors) as server:
            return not server.is_number()

    # Swapping weights in may drop what loading them does not, so the server is started on those that seem ignored.
    for name, tensors in ignored.items():
        if tensors and reads(tensors):
            ignored[name] = [tensor for tensor in tensors if len(tensors) > 1 and not reads([tensor])]
    return {name for name, tensors in ignored.items() if not tensors}
