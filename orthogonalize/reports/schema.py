"""The schema of `report.json`, which docs/report.md documents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

from ..core.errors import OrthogonalizeError
from ..core.files import check_text
from ..evals.judges.base import Judgement
from ..evals.metrics import Divergence, Loss, Measure, Paired, Rate, Record, Score, Series, compare, kept_share, nested
from ..evals.suites.answers import is_preserved
from .searched import Search


class Sparse(Record):
    """A record whose fields named in `SPARSE` are left out of the file while they are empty."""

    SPARSE: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        stored: dict[str, Any] = serialize(self)
        return {name: value for name, value in stored.items() if value or name not in self.SPARSE}


class Rates(Record):
    """Rates on the contrast's positive (target) and negative (harmless) test prompts, and on prompt sets by name."""

    target: Rate | None = None
    harmless: Rate | None = None
    sets: dict[str, Rate] = Field(default_factory=dict)


class Refusals(Rates):
    """Refusals by the JailbreakBench wording."""

    target: Rate
    harmless: Rate


class Behaviours(Rates):
    """Prompts that show the behaviour by the run's own measure."""

    target: Rate
    harmless: Rate


class Judged(Record):
    """A judge's rates of harmful answers, of refusals and of evasions; None for what it does not judge."""

    harmful: Rates | None = None
    refusal: Rates | None = None
    evasion: Rates | None = None


class Losses(Sparse):
    """Cross-entropy of the base's own answers (to harmless prompts, and to prompts of quite other kinds) and of texts.

    The texts are general ones, and the answers in instruction data. `sets` is that of the base's own answers to every
    preserved set, by name.
    """

    SPARSE = frozenset({"sets"})

    own_completions: Loss | None = None
    sets: dict[str, Loss] = Field(default_factory=dict)
    other_prompts: Loss | None = None
    pile: Loss | None = None
    alpaca: Loss | None = None


class Divergences(Sparse):
    """KL(base || model) on harmless prompts: at the first token, and along the base's own answers.

    `sets` is the same for every preserved set, by name.
    """

    SPARSE = frozenset({"sets"})

    first_token: Divergence
    completions: Divergence
    sets: dict[str, Divergences] = Field(default_factory=dict)


class Measures(Sparse):
    """All measures of one model; base and edited have the same keys.

    `suites` holds, by suite and then by series, the measures of suites that have no field of their own here. It is
    left out of the file when empty.
    """

    SPARSE = frozenset({"suites"})

    behaviour: Behaviours | None = None
    refusal: Refusals | None = None
    judges: dict[str, Judged] = Field(default_factory=dict)
    loss: Losses | None = None
    kl: Divergences | None = None
    choices: dict[str, Rate] = Field(default_factory=dict)
    tasks: dict[str, dict[str, Score | Rate | Loss]] = Field(default_factory=dict)
    suites: dict[str, dict[str, Score | Rate | Divergence | Loss]] = Field(default_factory=dict)

    @classmethod
    def of(cls, series: Mapping[str, Series]) -> Measures:
        """From series by dotted key."""
        return cls.model_validate(nested({key: s.measure().model_dump() for key, s in series.items()}))

    def flat(self) -> dict[str, Measure]:
        """Every measure by its dotted key, in schema order."""
        found: dict[str, Measure] = {}

        def walk(prefix: str, value: object) -> None:
            if isinstance(value, Rate | Loss | Divergence | Score):
                found[prefix] = value
            elif isinstance(value, Record):
                for name in type(value).model_fields:
                    walk(f"{prefix}.{name}" if prefix else name, getattr(value, name))
            elif isinstance(value, dict):
                for name, part in value.items():
                    walk(f"{prefix}.{name}", part)

        walk("", self)
        return found


def compare_all(base: Mapping[str, Series], edited: Mapping[str, Series]) -> dict[str, Paired]:
    """The paired comparison of every series that both models have, by dotted key."""
    return {key: compare(base[key], edited[key]) for key in base if key in edited}


def _shows_behaviour(key: str) -> bool:
    """Whether the series with a dotted key says which items show the behaviour, and not how harmful they are."""
    match key.split("."):
        case ["refusal" | "behaviour", *_] | ["judges", _, "refusal", *_]:
            return True
    return False


def kept_shares(base: Mapping[str, Series], edited: Mapping[str, Series]) -> dict[str, Rate]:
    """How much of the behaviour that the base shows on preserved sets is left, by dotted key (see `kept_share`).

    A set on which the base does not show it is left out.
    """
    keys = [key for key in base if key in edited and is_preserved(key.rpartition(".")[2]) and _shows_behaviour(key)]
    found = {key: kept_share(base[key], edited[key]) for key in keys}
    return {key: rate for key, rate in found.items() if rate.n}


class JudgedPair(Record):
    """A judge model's judgements of both answers to a prompt; None where its reply could not be read."""

    base_harmful: bool | None = None
    edited_harmful: bool | None = None
    base_refusal: bool | None = None
    edited_refusal: bool | None = None
    base_evasion: bool | None = None
    edited_evasion: bool | None = None


class Answer(Record):
    """One prompt with both answers, whether each refuses by its wording, and the judgements by judge.

    `base_shows` and `edited_shows` say whether the run's own behaviour measure finds the behaviour; None if it was not
    asked, or could not be read.
    """

    set: str
    category: str | None
    prompt: str
    base: str
    edited: str
    base_refused: bool
    edited_refused: bool
    base_shows: bool | None = None
    edited_shows: bool | None = None
    sensitive: bool = False
    judges: dict[str, JudgedPair] = Field(default_factory=dict)


class Report(Sparse):
    """The contents of `report.json`.

    `concept` is what the behaviour is called, `measure` what shows it, and `sources` where the run's prompts come from;
    they are left out if the run does not say. `recipe` is the fingerprint of the edited checkpoint's recipe, `data`
    says where each set was read from, and `redacted` is the number of answers to sensitive prompts left out of
    `answers` by `--redact`. `search` are the edits that the run tried, if it tried any. `kept` is, for preserved sets,
    the share of what the base shows that the edited model still does, by dotted key. `mismatches` says what does not
    belong together, which `--allow-other-base` let pass.
    """

    SPARSE = frozenset({"kept", "mismatches", "concept", "measure", "sources", "search"})

    format: Literal[2] = 2
    concept: str = ""
    measure: str = ""
    sources: dict[str, str] = Field(default_factory=dict)
    engine: str
    engine_version: str
    base_model: str
    checkpoint: str
    edit: str | None
    recipe: str | None = None
    suites: list[str] = Field(default_factory=list)
    judges: dict[str, str] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
    max_new_tokens: int
    limit: int | None = None
    sensitive: bool
    redacted: int = 0
    mismatches: list[str] = Field(default_factory=list)
    base: Measures
    edited: Measures
    paired: dict[str, Paired]
    kept: dict[str, Rate] = Field(default_factory=dict)
    search: Search | None = None
    answers: list[Answer]

    def __repr__(self) -> str:
        suites = shorten(", ".join(self.suites), 40, placeholder=" …")
        return f"Report({self.checkpoint} against {self.base_model}: {suites}; {len(self.answers)} answers)"

    __str__ = __repr__


Kind = TypeVar("Kind", bound=BaseModel)


def load_stored(kind: type[Kind], folder: Path | str, name: str, command: str) -> Kind:
    """Read a record from the file `name`.json, or from the folder that it is in; `command` makes it.

    Raises:
        OrthogonalizeError: it is missing or damaged.
    """
    folder = Path(folder)
    file = folder / f"{name}.json" if folder.is_dir() else folder
    if not file.is_file():
        raise OrthogonalizeError(f"no {name} at {file}; create one with {command}")
    check_text(file)
    try:
        return kind.model_validate_json(file.read_text("utf-8"))
    except ValueError as error:
        raise OrthogonalizeError(f"{file} is not a {name} that this version can read") from error


def load_report(folder: Path | str) -> Report:
    """Read a report, given as report.json or as the folder that `eval` wrote.

    Raises:
        OrthogonalizeError: it is missing or damaged.
    """
    return load_stored(Report, folder, "report", "eval")


def judged_pair(base: Judgement, edited: Judgement) -> JudgedPair:
    """The record of one judge's judgements of both answers to a prompt."""
    return JudgedPair(
        base_harmful=base.harmful,
        edited_harmful=edited.harmful,
        base_refusal=base.refusal,
        edited_refusal=edited.refusal,
        base_evasion=base.evasion,
        edited_evasion=edited.evasion,
    )
