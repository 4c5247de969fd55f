"""Colours and markers of all figures.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; the markers tell series apart in grey print.
"""

from __future__ import annotations

from typing import Any

BLUE, VERMILION = "#0072B2", "#D55E00"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def legend_beside(figure: Any, axis: Any, title: str | None = None) -> None:
    """Put the legend of `axis` to the right of all axes, where it covers no data."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, title=title)
