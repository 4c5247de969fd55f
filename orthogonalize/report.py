"""`report.json`: the schema of what `eval` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from .engines import EngineName
from .errors import OrthogonalizeError

Suite = Literal["refusal", "loss"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Rate(_Record):
    """A share of prompts, Wilson's 95% interval, and the same by category where prompts have one."""

    value: float
    n: int
    ci95: tuple[float, float]
    by_category: dict[str, Rate] = {}


class Loss(_Record):
    """Cross-entropy in nats a token over `n` texts, bootstrap 95% interval; `perplexity` is its exponential."""

    value: float
    n: int
    ci95: tuple[float, float] | None
    tokens: int
    perplexity: float


class Refusals(_Record):
    """Refusal rates by the JailbreakBench wording: on the contrast's positive and negative test prompts."""

    target: Rate
    harmless: Rate


class Losses(_Record):
    """Loss on the base model's own answers to harmless test prompts."""

    own_completions: Loss


class Measures(_Record):
    """What was measured of one model."""

    refusal: Refusals | None = None
    loss: Losses | None = None


class Paired(_Record):
    """Base against edited on the same items: the difference, and McNemar's p or the 95% interval."""

    difference: float
    p: float | None = None
    ci95: tuple[float, float] | None = None


class Answer(_Record):
    """One prompt with both answers."""

    set: Literal["target", "harmless"]
    category: str | None
    prompt: str
    base: str
    edited: str
    base_refused: bool
    edited_refused: bool


class Report(_Record):
    """`report.json`; `recipe` is the fingerprint of the edited checkpoint's recipe."""

    format: Literal[1] = 1
    engine: EngineName
    engine_version: str
    base_model: str
    checkpoint: str
    edit: str | None
    recipe: str | None = None
    max_new_tokens: int
    sensitive: bool
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
