"""The figure of a sweep: how much of the behaviour each edit removes, against the harm it does."""

from __future__ import annotations

import textwrap

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..core.errors import shown
from .style import COLOURS, MARKERS, as_written, ink, legend_beside
from .sweep import MARK, Sweep, drawn_points, sweep_caption
from .tables import title

LINE = 110  # letters of a title that fit above the figure


def pareto_figure(sweep: Sweep) -> Figure:
    """One point per edit on test prompts, coloured by method; edits on the Pareto front of val prompts are circled."""
    figure, axis = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    methods = list(dict.fromkeys(s.choice.method for s in sweep.variants))
    points = drawn_points(sweep)
    for i, method in enumerate(methods):
        mine = [p for p, s in points.values() if s.choice.method == method]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axis.scatter([100 * g for g, _ in mine], [h for _, h in mine], label=method, s=34, alpha=0.85, **style)
    for name in sweep.pareto:
        (gone, harm), _ = points[name]
        label = MARK if name == sweep.pareto[0] else None
        axis.scatter(100 * gone, harm, label=label, s=110, facecolors="none", edgecolors=ink(), zorder=0)
        axis.annotate(name, (100 * gone, harm), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axis.set_yscale("symlog", linthresh=0.1)
    effect, harm_name = (title(key or "", sweep.concept) for key in (sweep.effect, sweep.harm))
    relative = "relative increase of " if (sweep.harm or "").startswith("loss") else ""
    axis.set(xlabel=f"removed: {effect}, points", ylabel=f"harm: {relative}{harm_name}")
    # Not wrapped by Matplotlib, which would look for formulas in them.
    lines = (shown(sweep.model), sweep_caption(sweep))
    axis.set_title("\n".join(textwrap.fill(line, LINE) for line in lines), fontsize=9)
    axis.axhline(0, color="grey", alpha=0.5, linewidth=0.8, zorder=0)
    axis.axvline(0, color="grey", alpha=0.5, linewidth=0.8, zorder=0)
    legend_beside(figure, axis)
    return as_written(figure)
