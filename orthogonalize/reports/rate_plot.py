"""The figure of a report: every rate with its interval, base above edited."""

from __future__ import annotations

import base64
import io

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..evals.metrics import Rate
from .schema import Report
from .style import BLUE, VERMILION
from .tables import FORM, title


def rates_figure(report: Report) -> Figure | None:
    """Every rate with its 95% interval, base above edited; None if there are no rates.

    The forms of answers, six for every set, are left to the table.
    """
    edited = report.edited.flat()
    known = [{k for k, m in flat.items() if isinstance(m, Rate) and m.n} for flat in (report.base.flat(), edited)]
    keys = [k for k in report.base.flat() if k in known[0] & known[1] and not k.startswith(FORM)]
    if not keys:
        return None
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.55 * len(keys)), layout="constrained")
    for name, colour, marker, shift in (("base", BLUE, "o", 0.14), ("edited", VERMILION, "s", -0.14)):
        measures = report.base.flat() if name == "base" else edited
        rates = [m for k in keys if isinstance(m := measures[k], Rate)]
        places = [len(keys) - 1 - i + shift for i in range(len(keys))]
        values = [100 * r.value for r in rates]
        spread = [
            [100 * max(0.0, r.value - r.ci95[0]) for r in rates],
            [100 * max(0.0, r.ci95[1] - r.value) for r in rates],
        ]
        axis.errorbar(values, places, xerr=spread, fmt=marker, color=colour, capsize=3, label=name)
    axis.set(
        xlim=(-2, 102),
        ylim=(-0.6, len(keys) - 0.4),  # half a line around the first and the last
        xlabel="%",
        yticks=range(len(keys)),
        yticklabels=[title(k, report.concept) for k in reversed(keys)],
    )
    axis.grid(axis="x", color="0.9")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)  # clear of the bars
    return figure  # type: ignore[no-any-return]


def as_png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG bytes; closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()


def base64_of(png: bytes) -> str:
    """PNG bytes as base64."""
    return base64.b64encode(png).decode()
