"""The figures of a run, a report and a sweep: what is drawn, and that nothing covers it."""

from __future__ import annotations

import io
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
from helpers.command_line import UNTRIED
from helpers.made_up import sweep
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from orthogonalize import load_run, run_figures
from orthogonalize.evals.metrics import Rate
from orthogonalize.reports.pareto_plot import pareto_figure
from orthogonalize.reports.rate_plot import as_png, rates_figure
from orthogonalize.reports.run_plots import candidate_figure
from orthogonalize.reports.schema import Measures, Refusals, Report

RUN_SETTINGS = UNTRIED.with_changes(enough=1, seeds=2, train=6)
FIGURES = True  # of runs, at which tests look


def covered(figure: Figure) -> list[str]:
    """The legends that overlap axes, by their first text."""
    figure.draw_without_rendering()
    inside = [axis.get_window_extent() for axis in figure.axes]
    own = [legend for axis in figure.axes if (legend := axis.get_legend()) is not None]
    legends = [*figure.legends, *own]
    assert legends or len(figure.axes) > 0
    return [
        legend.get_texts()[0].get_text()
        for legend in legends
        if any(legend.get_window_extent().shrunk(0.98, 0.98).overlaps(box) for box in inside)
    ]


def test_no_legend_of_a_run_s_figures_covers_data(run):
    found = run_figures(load_run(run))
    assert {"candidates-dim", "probes", "cosines", "projections-dim"} <= found.keys()
    assert sum(bool(figure.legends) for figure in found.values()) >= 4
    assert {name: covered(figure) for name, figure in found.items() if covered(figure)} == {}


def test_candidates_without_a_score_are_left_out_of_its_panel(run):
    found = load_run(run)
    assert any(c.induce is None for c in found.candidates), "most are only estimated"
    bypass, induce, _ = candidate_figure(found, "dim").axes
    names = {found.info.position_name(p) for p in found.directions.positions}
    drawn = [[line for line in axis.lines if line.get_label() in names] for axis in (bypass, induce)]
    counts = [sum(len(line.get_xdata()) for line in lines) for lines in drawn]
    mine = [c for c in found.candidates if c.finder == "dim"]
    assert counts == [len(mine), sum(c.induce is not None for c in mine)]
    assert all(math.isfinite(y) for lines in drawn for line in lines for y in line.get_ydata())


def rates_report(concept: str | None = None) -> Report:
    rates = [Rate(value=v, n=10, ci95=(max(0.0, v - 0.1), min(1.0, v + 0.1))) for v in (1.0, 0.0)]
    models = [Measures(refusal=Refusals(target=a, harmless=b)) for a, b in (rates, rates[::-1])]
    report = Report(
        engine="hf", engine_version="transformers", base_model="base", checkpoint="edited", edit=None,
        max_new_tokens=100, sensitive=False, base=models[0], edited=models[1], paired={}, answers=[],
    )  # fmt: skip
    return report if concept is None else report.model_copy(update={"concept": concept})


def test_legend_and_marks_of_the_rates_are_clear_of_each_other():
    figure = rates_figure(rates_report())
    assert figure is not None
    assert covered(figure) == []
    (axis,) = figure.axes
    low, high = axis.get_ylim()
    marks = [y for line in axis.lines for y in line.get_ydata()]
    assert low + 0.3 < min(marks)
    assert max(marks) < high - 0.3


@pytest.mark.parametrize("position", [-1, -2])
def test_positions_are_named_with_their_tokens(run, position):
    info = load_run(run).info
    assert info.position_name(position) == f"{position} {info.position_tokens[position]!r}"
    assert info.model_copy(update={"position_tokens": []}).position_name(position) == str(position)


def luminance(colours: np.ndarray) -> np.ndarray:
    """The relative luminance of WCAG 2 of colours [..., 3] from 0 to 1."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("page", [(1.0, 1.0, 1.0), (0.07, 0.08, 0.09)], ids=["light", "dark"])
def test_plots_of_a_run_can_be_read_on_any_page(run, page):
    """They have no background, and no colour that is drawn is lost on the page's."""
    behind = luminance(np.array(page))
    plots = sorted((run / "plots").glob("*.png"))
    assert plots
    for plot in plots:
        pixels = plt.imread(plot)
        assert pixels[0, 0, 3] == 0, f"{plot.name} has a background"
        opaque = pixels[pixels[..., 3] > 0.98][:, :3]
        colours, counts = np.unique(opaque.round(2), axis=0, return_counts=True)
        drawn = luminance(colours[counts > 20])
        contrast = (np.maximum(drawn, behind) + 0.05) / (np.minimum(drawn, behind) + 0.05)
        assert contrast.min() > 1.9, (plot.name, colours[counts > 20][contrast.argmin()])


FORMULA = "a $\\frac{$ b"  # which is none


def test_names_and_tokens_of_strangers_are_no_formulas(run):
    found = load_run(run)
    tokens = [FORMULA] * len(found.info.position_tokens)
    odd = replace(found, info=found.info.model_copy(update={"position_tokens": tokens}))
    made_up = sweep({FORMULA: (0.5, 0.1)})
    figures = [
        candidate_figure(odd, "dim"),
        rates_figure(rates_report(FORMULA)),
        pareto_figure(made_up.model_copy(update={"model": f"{FORMULA}\x1b[31m", "concept": FORMULA})),
    ]
    for figure in figures:
        assert figure is not None
        figure.savefig(io.BytesIO(), format="png")
        plt.close(figure)


def chunks(picture: bytes) -> dict[str, bytes]:
    """The parts of a PNG by their names."""
    found, at = {}, 8
    while at < len(picture):
        (length,) = struct.unpack(">I", picture[at : at + 4])
        found[picture[at + 4 : at + 8].decode()] = picture[at + 8 : at + 8 + length]
        at += 12 + length
    return found


def test_pictures_say_nothing_of_the_machine_that_drew_them(run):
    figure = rates_figure(rates_report())
    assert figure is not None
    pictures = [as_png(figure), *(path.read_bytes() for path in (run / "plots").glob("*.png"))]
    assert len(pictures) > 3
    for picture in pictures:
        found = chunks(picture)
        assert found.keys() <= {"IHDR", "pHYs", "tEXt", "IDAT", "IEND"}
        assert found["tEXt"].startswith(b"Software\0Matplotlib version")
