"""A run: what `extract` found, on disk, enough to redo a choice without the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .directions import Directions
from .errors import OrthogonalizeError
from .prompts import Prompt, Side, Split
from .selection import Candidate
from .trials import Trial


class RunInfo(BaseModel):
    """`run.json`: where the run came from and with which settings."""

    model_config = ConfigDict(extra="forbid")

    model: str
    revision: str | None
    architecture: str
    weights: dict[str, str]
    prompts: dict[str, str]
    sensitive: bool
    system: str | None
    template_arguments: dict[str, Any]
    chat_template: bool
    layer_count: int
    width: int
    methods: list[str]
    behaviour_tokens: list[int]
    behaviour_words: list[str]
    base_score: dict[str, float]
    filtered: dict[str, dict[str, int]]
    seed: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Run:
    """The parts of a run folder."""

    info: RunInfo
    prompts: list[Prompt]
    directions: Directions
    candidates: list[Candidate]
    trials: list[Trial]

    def texts(self, side: Side, split: Split) -> list[str]:
        """The prompts of one side and split."""
        return [p.text for p in self.prompts if p.side == side and p.split == split]

    def save(self, folder: Path) -> None:
        """Write run.json, prompts.jsonl, directions.safetensors and candidates.json into `folder`."""
        (folder / "run.json").write_text(self.info.model_dump_json(indent=2) + "\n", "utf-8")
        with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
            for prompt in self.prompts:
                file.write(json.dumps(asdict(prompt), ensure_ascii=False) + "\n")
        self.directions.save(folder / "directions.safetensors")
        scores = {
            "candidates": [asdict(c) for c in self.candidates],
            "trials": [t.model_dump() for t in self.trials],
        }
        (folder / "candidates.json").write_text(json.dumps(scores, indent=1) + "\n", "utf-8")


def _candidates(rows: Sequence[dict[str, Any]]) -> list[Candidate]:
    return [Candidate(**{**row, "failed": tuple(row["failed"])}) for row in rows]


def load_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        OrthogonalizeError: it is none, or a part is missing or damaged.
    """
    if not (folder / "run.json").is_file():
        raise OrthogonalizeError(f"{folder} is not a run folder (it has no run.json); make one with extract")
    try:
        info = RunInfo.model_validate_json((folder / "run.json").read_text("utf-8"))
        lines = (folder / "prompts.jsonl").read_text("utf-8").split("\n")
        prompts = [Prompt(**json.loads(line)) for line in lines if line]
        scores = json.loads((folder / "candidates.json").read_text("utf-8"))
        candidates = _candidates(scores["candidates"])
        trials = [Trial.model_validate(row) for row in scores["trials"]]
        directions = Directions.load(folder / "directions.safetensors")
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise OrthogonalizeError(f"run folder {folder} is damaged ({reason}); extract it again") from error
    return Run(info, prompts, directions, candidates, trials)
