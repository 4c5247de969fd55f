"""Colours and markers of all figures.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; the markers tell series apart in grey print.
On a screen, figures have no background, and what is drawn can be read on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.text import Text

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


def as_written(figure: Figure) -> Figure:
    """The same figure, in which names are no formulas: a `$` in a token or a name would make one, or an error."""
    from matplotlib.ticker import FixedLocator

    texts = [*figure.texts, *(text for legend in figure.legends for text in _texts_of(legend))]
    for axis in figure.axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts, *_texts_of(axis.get_legend())]
        for side in (axis.xaxis, axis.yaxis):  # other ticks are numbers, whose powers are formulas
            if isinstance(side.get_major_locator(), FixedLocator):
                texts += side.get_ticklabels()
    for text in texts:
        text.set_parse_math(False)
    return figure


def _texts_of(legend: Legend | None) -> list[Text]:
    return [] if legend is None else [legend.get_title(), *legend.get_texts()]


def ink() -> str:
    """The colour of text and lines in the present style."""
    from matplotlib import rcParams

    return str(rcParams["text.color"])


def legend_beside(figure: Any, axis: Any, title: str | None = None) -> None:
    """Put the legend of `axis` to the right of all axes, where it covers no data."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, title=title)
