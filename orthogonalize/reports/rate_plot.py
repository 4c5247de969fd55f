"""The figure of a report: every rate with its interval, base above edited."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .schema import Report
from .style import BLUE, VERMILION, as_written
from .tables import drawn_rates, title


def rates_figure(report: Report) -> Figure | None:
    """Every rate with its 95% interval, base above edited; None if there are no rates."""
    drawn = drawn_rates(report)
    if not drawn:
        return None
    keys = list(drawn)
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.55 * len(keys)), layout="constrained")
    pairs = zip(*drawn.values(), strict=True)
    styles = (("base", BLUE, "o", 0.14), ("edited", VERMILION, "s", -0.14))
    for (name, colour, marker, shift), rates in zip(styles, pairs, strict=True):
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
    axis.grid(axis="x", color="grey", alpha=0.25)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)  # clear of the bars
    return as_written(figure)


def as_png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG bytes; closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()
