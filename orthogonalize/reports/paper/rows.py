"""The numbers behind every figure, as rows of a CSV file: a heading, then what is drawn, unrounded.

Shares are between 0 and 1, as in the JSON files; KL is in nats (per token for whole answers).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from ...directions.activation_store import Recording
from ...selection.run_folder import Run
from ..run_plots import accuracy_curves, cosine_series, planes, projections
from ..schema import Report
from ..sweep import Sweep, drawn_points
from ..tables import drawn_rates, title

Rows = Iterable[Sequence[object]]


def as_csv(rows: Rows) -> str:
    """Rows as the text of a CSV file; numbers are written so that they read back exactly, None as nothing."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def rate_rows(report: Report) -> Rows:
    """Every drawn rate of both models, with its 95% interval."""
    yield "measure", "title", "model", "share", "low", "high", "n"
    for key, pair in drawn_rates(report).items():
        for model, rate in zip(("base", "edited"), pair, strict=True):
            yield key, title(key, report.concept), model, rate.value, *rate.ci95, rate.n


def pareto_rows(sweep: Sweep) -> Rows:
    """Every drawn edit: the share of the behaviour that it removes, its harm, and whether it is on the front."""
    yield "edit", "method", "measure", "removed", "harm_measure", "harm", "pareto"
    for name, ((removed, harm), row) in drawn_points(sweep).items():
        yield name, row.choice.method, sweep.effect, removed + 0.0, sweep.harm, harm, name in sweep.pareto


def trial_rows(run: Run) -> Rows:
    """Every tried edit, with its number for `edit --pick` if it has one; the unedited model first."""
    yield "pick", "edit", "left", "kl"
    yield None, "none (the unedited model)", run.trials[0].before, 0.0
    numbers = {trial.choice: number for number, trial in enumerate(run.shortlist, 1)}
    for trial in run.trials:
        yield numbers.get(trial.choice), trial.choice.describe(), trial.left, trial.kl


def candidate_rows(run: Run, finder: str) -> Rows:
    """The scores of every direction of a finder, as drawn: those that it was not given are empty."""
    scores = ("bypass", "induce", "kl")
    yield "finder", "position", "layer", *(f"{name}{end}" for name in scores for end in ("", "_low", "_high"))
    for c in run.candidates:
        if c.finder == finder:
            cells = [(getattr(c, name), *(getattr(c, f"{name}_ci95") or (None, None))) for name in scores]
            yield c.finder, c.position, c.layer, *(cell for score in cells for cell in score)


def probe_rows(run: Run) -> Rows:
    """The accuracies of fresh probes."""
    yield "finder", "rank", "position", "layer", "before", "after", "chance", "n"
    for p in run.probes:
        yield p.method, p.rank, p.position, p.layer, p.before, p.after, p.chance, p.n


def cosine_rows(run: Run) -> Rows:
    """Every line of the figure of cosines."""
    yield "between", "layer", "cosine"
    for label, (layers, cosines) in cosine_series(run).items():
        yield from ((label, *point) for point in zip(layers, cosines, strict=True))


def accuracy_rows(run: Run) -> Rows:
    """The held-out accuracies of INLP's classifiers."""
    yield "layer", "classifier", "accuracy"
    for layer, curve in accuracy_curves(run).items():
        yield from ((layer, number, accuracy) for number, accuracy in enumerate(curve, 1))


def projection_rows(run: Run, recording: Recording) -> Rows:
    """Every val prompt along its layer's mean difference, in standard deviations."""
    yield "layer", "side", "projection"
    for layer, sides in projections(run, recording):
        yield from ((layer, side, float(row[0])) for side, values in sides.items() for row in values)


def plane_rows(run: Run, recording: Recording) -> Rows:
    """Every val prompt on INLP's first two directions, in standard deviations."""
    yield "layer", "side", "first", "second"
    for layer, sides in planes(run, recording).items():
        yield from ((layer, side, *map(float, row)) for side, values in sides.items() for row in values)
