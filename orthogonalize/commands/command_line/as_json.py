"""What commands print with --json: the numbers of their tables, unrounded, as one JSON document on standard output.

Notes and progress go to standard error, so that the output can be piped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


def echo_json(document: Any) -> None:
    """Print a document of built-in types and records; what is not a finite number is null."""
    from pydantic_core import to_json

    click.echo(to_json(document, indent=1, inf_nan_mode="null").decode())


def ranking(run: Any, candidates: Sequence[Any]) -> dict[str, Any]:
    """Every direction of a run in the order of `candidates`, beside the scores of the unedited model by side."""
    return {
        "unedited": run.info.base_score,
        "unedited_ci95": run.info.base_score_ci95,
        "candidates": [candidate.row() for candidate in candidates],
    }


def summary(run: Any, out: Path) -> dict[str, Any]:
    """What `extract` found: directions as in candidates.json, the edits to choose from by their number, and probes.

    `run` is None if the run is unfinished.
    """
    if run is None:
        return {"run": str(out), "finished": False}
    edits = [
        {"pick": number, "edit": trial.choice.describe(), **trial.model_dump(exclude={"kls"})}
        for number, trial in enumerate(run.shortlist, 1)
    ]
    return {
        "run": str(out),
        "finished": True,
        "concept": run.info.concept,
        "nothing_chosen": run.info.nothing_chosen,
        **ranking(run, run.candidates),
        "edits": edits,
        "probes": [probe.model_dump() for probe in run.probes],
    }


def demonstrated(result: Any, out: Path) -> dict[str, Any]:
    """What `demo` made: its edit, the proof of it, and the report, without prompts and answers."""
    return {
        "edit": result.recipe.choice.describe(),
        "verification": result.verification.model_dump(),
        **without_answers(result.report, out),
    }


def without_answers(report: Any, out: Path) -> dict[str, Any]:
    """A report as in report.json, without prompts and answers, and its folder."""
    return {"report": str(out), **report.model_dump(exclude={"answers"})}
