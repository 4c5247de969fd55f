"""Figures as papers want them: vector graphics as wide as a column, with small embedded fonts and no titles."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

COLUMN, PAGE = 3.35, 6.9  # inches: one column of two, and both
LETTER, LINE = 0.058, 0.13  # inches: the mean width of a letter, and the height of a line of a legend
LABEL, HANDLE = 26, 8  # letters: the longest line of a row's label, and the width of a legend's mark
SMALL = 6.0  # points: the least that is still read in print
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.linewidth": 0.6,
    "lines.markersize": 3.5,
    "errorbar.capsize": 1.5,
    "legend.fontsize": SMALL,
    "pdf.fonttype": 42,  # TrueType, embedded; many publishers refuse matplotlib's default, Type 3
    "svg.fonttype": "path",  # text as outlines, which need no font
    "svg.hashsalt": "orthogonalize",  # the same figure gives the same bytes
}
# Neither carries the time at which it was written.
FORMATS: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


@contextmanager
def paper_style() -> Iterator[None]:
    """Figures that are drawn and saved inside have the sizes of print."""
    with matplotlib.rc_context(STYLE):
        yield


def for_print(figure: Figure, width: float, height: float) -> None:
    """Fit a figure to `width` and `height` in inches: legends below the axes, long labels wrapped, no title.

    Titles of single panels are left to the caption. Legends add to the height.
    """
    panels = [axis for axis in figure.axes if axis.get_visible() and axis.get_label() != "<colorbar>"]
    figure.suptitle("")
    place = panels[0].get_subplotspec()
    columns = 1 if place is None else place.get_gridspec().ncols
    for axis in panels:
        _wrap(axis.title, width / columns if len(panels) > 1 else 0)
        _wrap(axis.xaxis.label, 0.8 * width / columns)
        _wrap(axis.yaxis.label, 0.8 * height)
        labels = [label.get_text() for label in axis.get_yticklabels()]
        if any(len(label) > LABEL for label in labels):
            axis.set_yticks(axis.get_yticks(), [textwrap.fill(label, LABEL) for label in labels], parse_math=False)
        for text in axis.texts:
            text.set_fontsize(SMALL)
    for legend in list(figure.legends):
        height += LINE * _put_below(figure, legend, width)
    figure.set_size_inches(width, height)


def _wrap(text: Text, inches: float) -> None:
    """Break a text into lines of at most `inches`, or drop it at 0. Names in it are no formulas."""
    text.set_text(textwrap.fill(text.get_text(), int(inches / LETTER)) if inches else "")
    text.set_parse_math(False)


def _put_below(figure: Figure, legend: Legend, width: float) -> int:
    """Move a legend below all axes; returns how many lines it takes there, its title included."""
    handles: list[Any] = list(legend.legend_handles)
    names = [text.get_text() for text in legend.get_texts()]
    title = legend.get_title().get_text()
    legend.remove()
    columns = max(1, min(len(names), int(width / LETTER / (HANDLE + max(map(len, names))))))
    below = figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, title=title or None,
        title_fontsize=SMALL,
    )  # fmt: skip
    for text in below.get_texts():
        text.set_parse_math(False)
    return -(-len(names) // columns) + bool(title)


def saved(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of a `pdf` or `svg` file, which depend on nothing but what is drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=FORMATS[kind])
    return buffer.getvalue()
