"""Every figure that `plot` can make of a run, a report or a sweep, with its numbers and its size in print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from ...core.errors import OrthogonalizeError
from ...directions.activation_store import FILE as ACTIVATIONS
from ...directions.activation_store import Recording
from ...selection.run_folder import Run
from .. import run_plots
from ..pareto_plot import pareto_figure
from ..rate_plot import rates_figure
from ..schema import Report
from ..sweep import Sweep, drawn_points
from ..tables import drawn_rates
from . import rows
from .layout import COLUMN, PAGE


@dataclass(frozen=True)
class PaperFigure:
    """A figure: how it is drawn, the rows of its numbers, and its size in inches without the legend below it."""

    draw: Callable[[], Figure | None]
    rows: Callable[[], rows.Rows]
    height: float
    width: float = COLUMN


def figures_of(source: Run | Report | Sweep) -> dict[str, PaperFigure]:
    """What can be drawn, by name; the first is the default.

    Raises:
        OrthogonalizeError: nothing can be.
    """
    if isinstance(source, Report):
        count = len(drawn_rates(source))
        found = {
            "rates": PaperFigure(partial(rates_figure, source), partial(rows.rate_rows, source), 0.6 + 0.3 * count)
        }
        return found if count else _none("the report has no rates")
    if isinstance(source, Sweep):
        found = {"pareto": PaperFigure(partial(pareto_figure, source), partial(rows.pareto_rows, source), 2.4)}
        return found if drawn_points(source) else _none("no edit of the sweep has both an effect and a harm")
    return _figures_of_run(source)


def _none(reason: str) -> dict[str, PaperFigure]:
    raise OrthogonalizeError(f"there is nothing to draw: {reason}")


def _figures_of_run(run: Run) -> dict[str, PaperFigure]:
    found: dict[str, PaperFigure] = {}
    if run.trials:
        found["trials"] = PaperFigure(partial(run_plots.trial_figure, run), partial(rows.trial_rows, run), 2.4)
    for finder in run.info.finders:
        draw, numbers = partial(run_plots.candidate_figure, run, finder), partial(rows.candidate_rows, run, finder)
        found[f"candidates-{finder}"] = PaperFigure(draw, numbers, 2.1, PAGE)
    if run.probes:
        height = 0.6 + 0.3 * len(run.probes)
        found["probes"] = PaperFigure(partial(run_plots.probe_figure, run), partial(rows.probe_rows, run), height)
    if run_plots.cosine_series(run):
        found["cosines"] = PaperFigure(partial(run_plots.cosine_figure, run), partial(rows.cosine_rows, run), 2.2)
    if run_plots.accuracy_curves(run):
        draw, numbers = partial(run_plots.accuracy_figure, run), partial(rows.accuracy_rows, run)
        found["inlp-accuracy"] = PaperFigure(draw, numbers, 2.4)
    if run.folder is not None:
        found |= _figures_of_activations(run, Recording(run.folder / ACTIVATIONS))
    return found


def _figures_of_activations(run: Run, recording: Recording) -> dict[str, PaperFigure]:
    draw, numbers = partial(run_plots.projection_figure, run, recording), partial(rows.projection_rows, run, recording)
    found = {"projections-dim": PaperFigure(draw, numbers, 2.2, PAGE)}
    count = len(run_plots.planes(run, recording))
    if count:
        draw_planes = partial(run_plots.plane_figure, run, recording)
        height = 0.3 + 0.95 * -(-count // 8)
        found["projections-inlp"] = PaperFigure(draw_planes, partial(rows.plane_rows, run, recording), height, PAGE)
    return found
