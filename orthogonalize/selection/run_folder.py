"""The run folder: the results of `extract`, which suffice to choose an edit without the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ..core.errors import OrthogonalizeError, first_line
from ..core.files import check_regular_files, check_text, parse_json, write_atomically
from ..core.output_folders import check_finished_run
from ..data.chat import ChatFormat
from ..data.prompts import Goal, PreservedPrompt, Prompt, Side, Split, target_side, texts_of
from ..data.thoughts import Thinking
from ..directions.activation_store import FILE as ACTIVATIONS
from ..directions.activation_store import Recording
from ..directions.direction_set import Directions
from ..edits.recipe import ProbeResult
from ..models.names import public_name
from .behaviour import MeasureInfo, load_readout
from .candidates import Candidate, Interval, Mean, rank_correlation
from .readouts import Readout
from .search.objectives import Trial, shortlist

PRESERVED = "preserved.jsonl"
_PROMPT, _PRESERVED = TypeAdapter(Prompt), TypeAdapter(PreservedPrompt)


class RunInfo(BaseModel):
    """The contents of `run.json`: the origin and settings of a run. The file calls the finders `methods`.

    `concept` is what the behaviour is called, `sources` where the prompts come from by side, and `measure` what shows
    the behaviour; `behaviour_tokens` are its first tokens, if it is read from them, and `behaviour_words` their text.
    `nothing_chosen` says why the run has no best edit, if it tried some and none does what it should.
    `position_tokens` are the tokens at the positions, the last at -1; none where prompts end with the instruction.
    `goal` is what the edits are for (see `Settings.goal`), and `thinking` what became of thoughts before answers.
    `sensitive` names the sensitive sides of the contrast, and `sensitive_preserved` the sensitive preserved sources.
    """

    model_config = ConfigDict(extra="forbid", validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    concept: str | None = None
    sources: dict[str, str] = Field(default_factory=dict)
    measure: MeasureInfo = Field(default_factory=MeasureInfo)
    model: str
    revision: str | None
    architecture: str
    weights: dict[str, str]
    prompts: dict[str, str]
    goal: Goal = "remove"
    sensitive: list[Side]
    sensitive_preserved: list[str] = Field(default_factory=list)
    system: str | None
    template_arguments: dict[str, Any]
    chat_template: bool
    thinking: Thinking = "keep"
    layer_count: int
    width: int
    nothing_chosen: str | None = None
    finders: list[str] = Field(validation_alias="methods", serialization_alias="methods")
    position_tokens: list[str] = Field(default_factory=list)
    behaviour_tokens: list[int]
    behaviour_words: list[str]
    base_score: dict[str, float]
    base_score_ci95: dict[str, Interval] = Field(default_factory=dict)
    filtered: dict[str, dict[str, int]]
    seed: int
    versions: dict[str, str]

    def position_name(self, position: int) -> str:
        """A position and, if known, the token there, as tables and figures show it."""
        known = -len(self.position_tokens) <= position < 0
        return f"{position} {self.position_tokens[position]!r}" if known else str(position)

    def chat_format(self, tokenizer: Any) -> ChatFormat:
        """How the run presents prompts to its model."""
        return ChatFormat(tokenizer, self.system, self.template_arguments, self.chat_template, self.thinking)


@dataclass(frozen=True)
class Run:
    """The contents of a run folder, if it was read from one; `trials` are the tried edits, the best first."""

    info: RunInfo
    prompts: list[Prompt]
    directions: Directions
    candidates: list[Candidate]
    trials: list[Trial]
    probes: list[ProbeResult] = field(default_factory=list)
    preserved: list[PreservedPrompt] = field(default_factory=list)
    folder: Path | None = None

    def __repr__(self) -> str:
        return (
            f"Run({public_name(self.info.model)}: {', '.join(self.info.finders)}; "
            f"{len(self.candidates)} candidates, {len(self.trials)} edits tried)"
        )

    @property
    def best(self) -> Trial:
        """The best of the tried edits, which `edit` makes by default.

        Raises:
            OrthogonalizeError: the run tried none, or none does what it should.
        """
        if not self.trials:
            raise OrthogonalizeError("this run tried no edits (extract --trials 0)")
        if self.info.nothing_chosen is not None:
            raise OrthogonalizeError(f"no edit was chosen: {self.info.nothing_chosen}")
        return self.trials[0]

    @property
    def shortlist(self) -> list[Trial]:
        """The tried edits to choose from: the best, then the rest of the Pareto front (see `shortlist`)."""
        return shortlist(self.trials)

    @property
    def target_side(self) -> Side:
        """The side whose behaviour the run's edits change: the positive one, unless there are target prompts."""
        return target_side(self.prompts)

    def readout(self) -> Readout:
        """The readout by which the run's edits were tried.

        Raises:
            OrthogonalizeError: its file is missing or damaged.
        """
        return load_readout(self.info.measure, self.info.behaviour_tokens, self.folder or Path())

    def activations(self, side: Side, split: Split, position: int, layer: int) -> torch.Tensor:
        """The residual stream [prompts, d] at the input of block `layer`, as stored, in the order of `texts`.

        Args:
            side, split: which prompts; activations of test prompts are not stored.
            position: the token, counted from the end of the prompt (-1 is the last).
            layer: the block; `layer_count` is the input of the head's norm.

        Raises:
            OrthogonalizeError: the run has no such activations.
        """
        if self.folder is None:
            raise OrthogonalizeError("this run was not read from a folder, where activations are stored")
        self.directions.check_place(position)
        stored = Recording(self.folder / ACTIVATIONS).read(f"{side}.{split}", layer)
        return stored[:, self.directions.positions.index(position)]

    def texts(self, side: Side, split: Split) -> list[str]:
        """The prompts of one side and split."""
        return texts_of(self.prompts, side, split)


def package_versions() -> dict[str, str]:
    """The versions of this package and of those that its results depend on."""
    found = {}
    for package in ("orthogonalize", "torch", "transformers", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def base_scores(prompts: Sequence[Prompt]) -> dict[str, Mean]:
    """The mean score of the unedited model on val prompts, by side."""
    scores: dict[str, list[float]] = {}
    for p in prompts:
        if p.split == "val" and p.score is not None:
            scores.setdefault(p.side, []).append(p.score)
    return {side: Mean.of(each) for side, each in scores.items()}


def save_prompts(prompts: Sequence[Prompt], folder: Path) -> None:
    """Write prompts.jsonl."""
    rows = [json.dumps(asdict(prompt), ensure_ascii=False) for prompt in prompts]
    write_atomically(folder / "prompts.jsonl", "\n".join(rows) + "\n")


def load_prompt_file(folder: Path) -> list[Prompt]:
    """Read prompts.jsonl."""
    lines = (folder / "prompts.jsonl").read_text("utf-8").split("\n")
    return [_PROMPT.validate_json(line) for line in lines if line]


def save_preserved(prompts: Sequence[PreservedPrompt], folder: Path) -> None:
    """Write preserved.jsonl, if there are any."""
    rows = [json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts]
    if rows:
        write_atomically(folder / PRESERVED, "".join(rows))
    else:
        (folder / PRESERVED).unlink(missing_ok=True)


def load_preserved(folder: Path) -> list[PreservedPrompt]:
    """Read preserved.jsonl; none if there is no such file."""
    file = folder / PRESERVED
    lines = file.read_text("utf-8").split("\n") if file.is_file() else []
    return [_PRESERVED.validate_json(line) for line in lines if line]


def save_selection(
    candidates: Sequence[Candidate], trials: Sequence[Trial], probes: Sequence[ProbeResult], folder: Path
) -> None:
    """Write candidates.json: candidates, tried edits, probes, and the correlation of local and global scores.

    `shortlist` are the places, from 0, of the edits to choose from among the trials.
    """
    finders = dict.fromkeys(c.finder for c in candidates)
    places = {t.choice: i for i, t in enumerate(trials)}
    found = {
        "spearman": {finder: rank_correlation(candidates, finder) for finder in finders},
        "candidates": [c.row() for c in candidates],
        "trials": [t.model_dump(exclude={"kls"}) for t in trials],
        "shortlist": [places[t.choice] for t in shortlist(trials)],
        "probes": [p.model_dump() for p in probes],
    }
    write_atomically(folder / "candidates.json", json.dumps(found, indent=1) + "\n")


def load_run(folder: Path | str) -> Run:
    """Read a run folder.

    Raises:
        OrthogonalizeError: it is not a run folder, or a part is missing or damaged.
    """
    folder = Path(folder)
    check_finished_run(folder)
    check_regular_files(folder)
    for name in ("run.json", "prompts.jsonl", PRESERVED, "candidates.json"):
        check_text(folder / name)
    try:
        info = RunInfo.model_validate_json((folder / "run.json").read_text("utf-8"))
        prompts, preserved = load_prompt_file(folder), load_preserved(folder)
        scores = parse_json((folder / "candidates.json").read_text("utf-8"))
        candidates = [Candidate.from_row(row) for row in scores["candidates"]]
        trials = [Trial.model_validate(row) for row in scores["trials"]]
        probes = [ProbeResult.model_validate(row) for row in scores["probes"]]
        directions = Directions.load(folder / "directions.safetensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise OrthogonalizeError(f"run folder {folder} is damaged ({reason}); extract again") from error
    return Run(info, prompts, directions, candidates, trials, probes, preserved, folder)
