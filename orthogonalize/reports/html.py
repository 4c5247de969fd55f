"""The report as one self-contained HTML page, which needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .findings import findings
from .rate_plot import as_png, base64_of, rates_figure
from .schema import Judged, Report
from .tables import LEGEND, category_rows, set_title, summary_rows
from .templating import templates


def _judged(measured: Judged | None, harmful: bool | None, refusal: bool | None) -> str:
    """A judge's judgement of one answer, in words; `measured` tells which fields the judge fills."""
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
            legend=LEGEND,
            judged=_judged,
            rows=summary_rows(report, categories=False),
            categories=category_rows(report),
            findings=findings(report),
            rates=None if figure is None else base64_of(as_png(figure)),
            images=[(p.stem, base64_of(p.read_bytes())) for p in plots],
            sets=[(name, set_title(name)) for name in dict.fromkeys(a.set for a in report.answers)],
        )
    )
    file.write_text(page, "utf-8")
