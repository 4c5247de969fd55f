"""`report.json`: the schema of what `eval` measures (docs/report.md says it in prose)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..core.errors import OrthogonalizeError
from ..evals.judges.catalogue import Judgement
from ..evals.metrics import Divergence, Loss, Measure, Paired, Rate, Record, Score, Series, compare, nested


class Rates(Record):
    """Rates on the contrast's positive and negative test prompts, and on further prompt sets by name."""

    target: Rate | None = None
    harmless: Rate | None = None
    sets: dict[str, Rate] = Field(default_factory=dict)


class Refusals(Rates):
    """Refusals by the JailbreakBench wording."""

    target: Rate
    harmless: Rate


class Behaviours(Rates):
    """Answers that begin with one of the run's behaviour tokens, whatever the contrast is about."""

    target: Rate
    harmless: Rate


class Judged(Record):
    """What a judge model says: the share of harmful answers and, where it tells, of refusals."""

    harmful: Rates | None = None
    refusal: Rates | None = None


class Losses(Record):
    """Cross-entropy: of the base's own harmless answers, of general text, of the answers in instruction data."""

    own_completions: Loss | None = None
    pile: Loss | None = None
    alpaca: Loss | None = None


class Divergences(Record):
    """KL(base || model) on harmless prompts: first token, and along the base's own answers."""

    first_token: Divergence
    completions: Divergence


class Measures(Record):
    """What was measured of one model; the same keys for base and edited."""

    behaviour: Behaviours | None = None
    refusal: Refusals | None = None
    judges: dict[str, Judged] = Field(default_factory=dict)
    loss: Losses | None = None
    kl: Divergences | None = None
    choices: dict[str, Rate] = Field(default_factory=dict)
    tasks: dict[str, dict[str, Score | Rate | Loss]] = Field(default_factory=dict)

    @classmethod
    def of(cls, series: Mapping[str, Series]) -> Measures:
        """From series by dotted key."""
        return cls.model_validate(nested({key: s.measure().model_dump() for key, s in series.items()}))

    def flat(self) -> dict[str, Measure]:
        """Every measure by its dotted key, in the order of the schema."""
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
    """The paired comparison of every measure that both have, by the same dotted key."""
    return {key: compare(base[key], edited[key]) for key in base if key in edited}


class Verdict(Record):
    """What a judge model said of both answers to a prompt; None where its answer could not be read."""

    base_harmful: bool | None = None
    edited_harmful: bool | None = None
    base_refusal: bool | None = None
    edited_refusal: bool | None = None


class Answer(Record):
    """One prompt with both answers, whether each refuses by its wording, and what judges say."""

    set: str
    category: str | None
    prompt: str
    base: str
    edited: str
    base_refused: bool
    edited_refused: bool
    sensitive: bool = False
    judges: dict[str, Verdict] = Field(default_factory=dict)


class Report(Record):
    """`report.json`; `recipe` is the fingerprint of the edited checkpoint's recipe.

    `data` says where each set was read from; `redacted` how many answers to sensitive prompts were left
    out of `answers` on request.
    """

    format: Literal[2] = 2
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
    base: Measures
    edited: Measures
    paired: dict[str, Paired]
    answers: list[Answer]


def load_report(folder: Path) -> Report:
    """Read the report.json of a folder that `eval` made.

    Raises:
        OrthogonalizeError: there is none, or it is damaged.
    """
    file = folder / "report.json" if folder.is_dir() else folder
    if not file.is_file():
        raise OrthogonalizeError(f"no report at {file}; make one with eval")
    try:
        return Report.model_validate_json(file.read_text("utf-8"))
    except ValueError as error:
        raise OrthogonalizeError(f"{file} is not a report that this version reads") from error


def verdict(base: Judgement, edited: Judgement) -> Verdict:
    """What a judge says of both answers to one prompt."""
    return Verdict(
        base_harmful=base.harmful,
        edited_harmful=edited.harmful,
        base_refusal=base.refusal,
        edited_refusal=edited.refusal,
    )
