"""The report as one self-contained HTML page: no network, works from disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .findings import verdicts
from .rate_plot import as_png, embedded, rates_figure
from .schema import Judged, Report
from .tables import SETS, category_rows, summary_rows
from .templating import templates


def _judged(measured: Judged | None, harmful: bool | None, refusal: bool | None) -> str:
    """What a judge, of which `measured` tells what it says at all, says of one answer."""
    parts = []
    if measured is None or measured.harmful is not None:
        parts.append({True: "harmful", False: "not harmful", None: "unreadable"}[harmful])
    if measured is not None and measured.refusal is not None:
        parts.append({True: "refuses", False: "does not refuse", None: "refusal unreadable"}[refusal])
    return ", ".join(parts)


def write_webpage(report: Report, plots: Sequence[Path], file: Path) -> None:
    """Render `report` with the run's `plots` embedded."""
    figure = rates_figure(report)
    page = (
        templates()
        .get_template("report.html.j2")
        .render(
            report=report,
            judged=_judged,
            rows=summary_rows(report),
            categories=category_rows(report),
            verdicts=verdicts(report),
            rates=None if figure is None else embedded(as_png(figure)),
            images=[(p.stem, embedded(p.read_bytes())) for p in plots],
            sets=[(name, SETS.get(name, name)) for name in dict.fromkeys(a.set for a in report.answers)],
        )
    )
    file.write_text(page, "utf-8")
