"""Colours and markers of all figures.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; the markers tell series apart in grey print.
"""

from __future__ import annotations

BLUE, VERMILION = "#0072B2", "#D55E00"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
