"""What is tracked of a run, a report and a sweep: numbers, and public names of what was done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from ...core.errors import OrthogonalizeError, first_line
from ...models.names import public_name
from ...selection.run_folder import Run
from ..schema import Measures, Report
from ..sweep import Sweep
from .base import Facts, TrackedRun
from .registry import find_tracker

Steps = Iterator[Mapping[str, float]]
"""The numbers of one step after another."""


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}


def run_steps(run: Run) -> Steps:
    """The tried edits of a run, the best first, and beside the first what it found overall."""
    best = {
        f"best/{finder}/{name}": getattr(next(c for c in run.candidates if c.finder == finder), name)
        for finder in dict.fromkeys(c.finder for c in run.candidates)
        for name in ("bypass", "induce", "kl")
    }
    rows = [
        {
            "edit/behaviour left": trial.left, "edit/kl": trial.kl, "edit/first kl": trial.first_kl,
            "edit/cross-entropy increase": trial.ce_increase, "edit/left in answers": trial.confirmed,
        }
        for trial in run.trials
    ] or [{}]  # fmt: skip
    for number, row in enumerate(rows):
        yield _finite(row | best if number == 0 else row)


def _measures(prefix: str, measures: Measures) -> dict[str, float | None]:
    return {f"{prefix}/{key}": measure.value for key, measure in measures.flat().items()}


def report_steps(report: Report) -> Steps:
    """All measures of base and edited model, in one step."""
    yield _finite(_measures("base", report.base) | _measures("edited", report.edited))


def sweep_steps(sweep: Sweep) -> Steps:
    """The base's measures, and then each edit's."""
    yield _finite(_measures("measure", sweep.base))
    for row in sweep.variants:
        yield {} if row.measures is None else _finite(_measures("measure", row.measures))


def run_facts(run: Run) -> Facts:
    """What a run is of."""
    info = run.info
    chosen = run.trials[0].choice.describe() if run.trials and info.nothing_chosen is None else "none"
    return {
        "model": public_name(info.model), "concept": info.concept or "", "goal": info.goal,
        "measure": info.measure.public_name, "finders": ", ".join(info.finders), "seed": info.seed, "edit": chosen,
    }  # fmt: skip


def report_facts(report: Report) -> Facts:
    """What a report is of."""
    return {
        "model": report.base_model, "edited": report.checkpoint, "edit": report.edit or "", "concept": report.concept,
        "engine": report.engine_version, "suites": ", ".join(report.suites),
    }  # fmt: skip


def sweep_facts(sweep: Sweep) -> Facts:
    """What a sweep is of; edits are numbered by step, from 1."""
    edits = {f"step {number}": row.name for number, row in enumerate(sweep.variants, 1)}
    return {"model": sweep.model, "concept": sweep.concept, "engine": sweep.engine_version} | edits


def track_result(tracker: str, result: Run | Report | Sweep, out: Path) -> None:
    """Give the numbers of a finished command, whose output folder is `out`, to the tracker of that name.

    Raises:
        OrthogonalizeError: there is no such tracker, its package is missing, or it fails.
    """
    if isinstance(result, Run):
        job, facts, steps = "extract", run_facts(result), run_steps(result)
    elif isinstance(result, Report):
        job, facts, steps = "eval", report_facts(result), report_steps(result)
    else:
        job, facts, steps = "sweep", sweep_facts(result), sweep_steps(result)
    place = out.absolute()
    whole = {**facts, "orthogonalize": version("orthogonalize")}
    entry = find_tracker(tracker)
    try:
        opened = entry.open(TrackedRun(job, place.name, place.parent, whole))
        try:
            for number, metrics in enumerate(steps):
                if metrics:
                    opened.log(metrics, number)
        finally:
            opened.close()
    except Exception as error:  # the packages and the network can raise anything
        raise OrthogonalizeError(
            f"{out} is complete, but {tracker} did not take its numbers: {first_line(error)}"
        ) from error
