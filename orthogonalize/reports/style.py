"""Colours and markers of all figures.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; the markers tell series apart in grey print.
On a screen, figures have no background, and what is drawn can be read on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BLUE, VERMILION, NEUTRAL = "#0072B2", "#D55E00", "#767676"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", NEUTRAL)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SHADES = (0.3, 0.75)  # of a colour map: neither its darkest nor its lightest part
SCREEN = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), NEUTRAL),
    "legend.framealpha": 0.0,
    "legend.edgecolor": NEUTRAL,
}


@contextmanager
def screen_style() -> Iterator[None]:
    """Figures that are drawn and saved inside can be read on a page of any colour."""
    from matplotlib import rc_context

    with rc_context(SCREEN):
        yield


def ink() -> str:
    """The colour of text and lines in the present style."""
    from matplotlib import rcParams

    return str(rcParams["text.color"])


def legend_beside(figure: Any, axis: Any, title: str | None = None) -> None:
    """Put the legend of `axis` to the right of all axes, where it covers no data."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, title=title)
