"""The charts of the pages: every number has its mark, in its place, in words, and the pages need no picture files."""

from __future__ import annotations

import html
import re

import pytest
from helpers.command_line import UNTRIED
from helpers.made_up import SEARCH, report, sweep

from orthogonalize import load_run
from orthogonalize.edits.config import EditConfig
from orthogonalize.reports.pages.charts import Axis
from orthogonalize.reports.pages.report_charts import cost_chart, rate_chart, search_chart
from orthogonalize.reports.pages.report_page import write_webpage
from orthogonalize.reports.pages.sweep_page import sweep_chart, write_sweep_page
from orthogonalize.reports.searched import searched

RUN_SETTINGS = UNTRIED


def marks_of(page: str) -> list[str]:
    """The words of every mark, each of which is its label and its tooltip."""
    found = re.findall(r'<g class="mark [^>]* aria-label="([^"]*)"[^>]*><title>([^<]*)</title>', page)
    assert all(label == tooltip for label, tooltip in found)
    return [html.unescape(label) for label, _ in found]


@pytest.mark.parametrize("linear", [None, 0.1])
def test_an_axis_keeps_the_order_and_ends_at_its_ends(linear):
    axis = Axis.around([3.0, -0.5, 40.0], linear)
    places = [axis.place(v) for v in (-9.0, -0.5, 0.0, 3.0, 40.0, 99.0)]
    assert places[0] == places[1] == 0
    assert places[-1] == places[-2] == 100
    assert places[1:5] == sorted(set(places[1:5]))
    ticks = axis.ticks(100, "%")
    assert 3 <= len(ticks) <= 9
    for place, text in ticks:
        assert place == axis.place(float(text.removesuffix("%")) / 100)


def test_every_rate_has_a_mark_for_both_models():
    chart = rate_chart(report())
    assert [name for name, _ in chart.rows] == [
        "lists, target prompts", "lists, harmless prompts", "refusal, target prompts", "refusal, harmless prompts",
    ]  # fmt: skip
    base, edited = chart.rows[0][1]
    assert (base.x, base.interval, edited.x, edited.interval) == (90, (80, 100), 10, (0, 20))
    assert edited.words == "edited: 10.0%, 95%: 0.0% to 20.0%, n = 50"


def test_costs_stand_on_the_right_side_of_zero():
    (_, (mark,)), chart = cost_chart(report()).rows[0], cost_chart(report())
    assert mark.interval[0] < chart.zero < mark.x < mark.interval[1]
    assert mark.words == "+2.0%, 95%: -1.0% to +5.0%, n = 50"


def test_the_search_shows_the_base_every_edit_and_this_one():
    chart = search_chart(SEARCH)
    assert [(mark.kind, mark.label) for mark in chart.marks] == [
        ("unedited", ""), ("tried", ""), ("front", "2"), ("chosen", "1"),
    ]  # fmt: skip
    unedited, poor, mild, best = chart.marks
    assert best.x < mild.x < poor.x < unedited.x
    assert poor.y < best.y < mild.y < unedited.y == 100, "more KL is higher up"


def test_a_run_without_trials_has_no_search(run):
    assert searched(load_run(run).trials, None) is None
    assert search_chart(None) is None


def test_report_page_draws_every_mark_in_words_without_pictures(tmp_path):
    write_webpage(report(search=SEARCH), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    charts = [rate_chart(report()), cost_chart(report())]
    drawn = [mark for chart in charts for _, row in chart.rows for mark in row] + list(search_chart(SEARCH).marks)
    assert marks_of(page) == [mark.words for mark in drawn]
    assert "<img" not in page
    assert "&lt;best&gt; (this edit)" in page
    assert page.count("<h1>") == 1


def test_sweep_page_ties_every_mark_to_its_row(tmp_path):
    found = sweep({"mild": (0.5, 0.01), "strong": (0.8, 0.2), 'bad "<x>"': (0.4, 0.3)})
    write_sweep_page(found, tmp_path / "sweep.html")
    page = (tmp_path / "sweep.html").read_text()
    rows = [html.unescape(key) for key in re.findall(r'<tr data-key="([^"]*)"', page)]
    assert rows == ["base", *(row.name for row in found.variants)]
    assert {mark.key for mark in sweep_chart(found).marks} == set(rows) - {"not this"}
    ringed = [(mark.key, mark.label) for mark in sweep_chart(found).marks if mark.ringed]
    assert ringed == [("mild", "1"), ("strong", "2")]
    assert len(marks_of(page)) == 4
    assert "not possible: why" in page
    assert "<x>" not in page


def test_a_sweep_of_many_methods_has_a_shape_for_each(tmp_path):
    found = sweep({f"edit {i}": (i / 20, i / 50) for i in range(9)})
    for row, method in zip(
        found.variants, ("ablate", "nullspace", "reflect", "actadd", "leace", "conditional") * 2, strict=False
    ):
        row.choice = EditConfig(method=method)
    write_sweep_page(found, tmp_path / "sweep.html")
    kinds = {mark.kind for mark in sweep_chart(found).marks}
    assert kinds == {"unedited", "m0", "m1", "m2", "m3", "m4", "m5"}
