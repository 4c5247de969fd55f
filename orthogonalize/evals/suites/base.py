"""The interface of a suite, the entry that declares one, and the context that it is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ...core.errors import OrthogonalizeError
from ...core.progress import note
from ...data.benchmarks import BenchmarkSet

if TYPE_CHECKING:
    from ...data.chat import ChatFormat
    from ...engines.base import Responder
    from ...models.logprobs import Likeliest
    from ...selection.run_folder import Run
    from ..metrics import Series
    from .answers import Answering

Needs = Literal["nothing", "base answers"]
HARMLESS = "harmless"  # the prompt set of the contrast's negative side


@dataclass(frozen=True)
class BaseAnswers:
    """The prompts of a set to which the base gave a non-empty answer, and those answers, as token ids."""

    prompts: list[list[int]]
    answers: list[list[int]]


@dataclass
class BaseOutputs:
    """What the base model generated, for suites that compare every model with it.

    `own` are its answers to `HARMLESS` prompts and to those of every preserved set, by set, and `distributions` its
    likeliest tokens along them. `kept` holds, by suite, what else a suite needs of the base, as JSON values. All are
    set once, while the base is measured.
    """

    own: dict[str, BaseAnswers] = field(default_factory=dict)
    distributions: dict[str, list[Likeliest]] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    def remember(self, name: str, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
        """Keep the base's non-empty answers to the prompt set `name`; a preserved set without any is left out.

        Raises:
            OrthogonalizeError: all answers to harmless prompts are empty.
        """
        kept = [(list(p), list(a)) for p, a in zip(prompts, answers, strict=True) if a]
        if kept:
            self.own[name] = BaseAnswers([p for p, _ in kept], [a for _, a in kept])
        elif name == HARMLESS:
            raise OrthogonalizeError("every answer of the base model is empty; leave out --suite loss and kl")
        else:
            note(f"every answer of the base model to {name} is empty; suites loss and kl leave the set out")

    def restore(self, rows: Mapping[str, Sequence[Any]]) -> None:
        """Set the base's distributions from their JSON form, by set (see `Likeliest.rows`)."""
        from ...models.logprobs import Likeliest

        self.distributions = {name: [Likeliest.of(pair) for pair in pairs] for name, pairs in rows.items()}


class Suite(Protocol):
    """Measures that are taken together. Its data are read when it is built, so that missing data show early."""

    @property
    def name(self) -> str: ...

    @property
    def longest(self) -> int:
        """The maximum number of tokens per request, prompt and completion together."""

    @property
    def state(self) -> str:
        """A fingerprint of what the suite asks and how it scores; a stored measurement is reused while it is equal."""

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """Measure the model in `engine`.

        Returns series by key. A key without a dot is stored in reports under `suites.SUITE.KEY`; keys with dots
        ("choices.mmlu") are those that have a place of their own in the report's schema.
        """


class SourcedSuite(Suite, Protocol):
    """A suite that says where its data come from."""

    @property
    def source(self) -> str: ...


@dataclass(frozen=True)
class SuiteContext:
    """What a suite is built from.

    Args:
        run: the run whose edit is measured.
        tokenizer: of the base model.
        chat: formats prompts for the model as `extract` did.
        data: a folder with local copies of public sets; None to read them from the Hub.
        limit: maximum number of items to measure; None for no limit.
        new_tokens: maximum number of tokens per answer.
        positions: maximum number of tokens that the model takes, where known.
        answering: the prompts that are answered; None if no suite needs answers.
    """

    run: Run
    tokenizer: Any
    chat: ChatFormat
    data: Path | None
    limit: int | None
    new_tokens: int
    positions: int | None
    answering: Answering | None = None

    @property
    def base_answers(self) -> Answering:
        """The prompts that are answered, for an entry whose `needs` says that some are."""
        assert self.answering is not None
        return self.answering


@dataclass(frozen=True)
class SuiteEntry:
    """One value of `--suite`.

    Args:
        name: the value; no dots, commas, colons or spaces.
        summary: one line for `--help` and docs/measuring.md.
        titles: what reports call each series that the suite returns, by its key.
        make: builds the suite; None for `refusal` and `behaviour`, which are counted in every model's answers to the
            run's prompts (see `Answering`).
        source: the public set that it reads, if any. While `make` runs, a row of another schema is one clear error.
        needs: "base answers" if `measure` needs the base's answers to the run's harmless and preserved prompts
            in `BaseOutputs`.
        columns: the series that get a column in a sweep's table; by default all.
        origin: where its data come from, if neither from the run nor from a public set.
    """

    name: str
    summary: str
    titles: Mapping[str, str]
    make: Callable[[SuiteContext], Suite] | None = None
    source: BenchmarkSet | None = None
    needs: Needs = "nothing"
    columns: tuple[str, ...] | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        if not self.name or any(c in ".,:" or c.isspace() for c in self.name):
            raise ValueError(f"a suite cannot be called {self.name!r}: no dots, commas, colons or spaces")

    @property
    def report_titles(self) -> dict[str, str]:
        """Titles by dotted key in the report."""
        return {report_key(self.name, key): title for key, title in self.titles.items()}

    @property
    def report_columns(self) -> frozenset[str]:
        """The dotted keys that get a column in a sweep's table."""
        keys = self.titles if self.columns is None else self.columns
        return frozenset(report_key(self.name, key) for key in keys)


@dataclass(frozen=True)
class SuiteFamily:
    """All suites whose names begin with a prefix: `--suite PREFIXargument`.

    `make` builds one suite for each argument; it gets them together so that it can load shared data once.
    """

    name: str
    argument: str
    summary: str
    make: Callable[[SuiteContext, Sequence[str]], Sequence[SourcedSuite]]


def report_key(suite: str, key: str) -> str:
    """The dotted key under which reports store a series of a suite."""
    return key if "." in key else f"suites.{suite}.{key}"
