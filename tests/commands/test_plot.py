"""`plot`: real vector files for papers, and CSV files that equal the JSON that they are drawn from."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from helpers.command_line import SMALL, command
from helpers.made_up import measures, report, sweep
from matplotlib import pyplot as plt

from orthogonalize import load_run, plot
from orthogonalize.reports.paper.figures import figures_of
from orthogonalize.reports.paper.layout import COLUMN, PAGE, for_print, paper_style

RUN_SETTINGS = SMALL


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plotted") / "report"
    folder.mkdir()
    made = report(base=measures(2 / 3), edited=measures(1 / 9))
    (folder / "report.json").write_text(made.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plotted") / "sweep"
    folder.mkdir()
    made = sweep({"mild $all_": (1 / 3, 0.0), "strong $all_": (2 / 3, 1 / 7)})
    (folder / "sweep.json").write_text(made.model_dump_json())
    return folder


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def assert_for_print(file: Path, width: float) -> None:
    """A PDF page of `width` inches whose fonts are all embedded, without a picture of pixels or a date."""
    content = file.read_bytes()
    assert content.startswith(b"%PDF-")
    assert content.rstrip().endswith(b"%%EOF")
    (box,) = re.findall(rb"/MediaBox \[([^\]]*)\]", content)
    assert float(box.split()[2]) == pytest.approx(72 * width, abs=0.1)
    descriptors, files = content.count(b"/Type /FontDescriptor"), content.count(b"/FontFile2")
    assert descriptors == files > 0
    assert b"/Type3" not in content
    assert b"/Subtype /Image" not in content
    assert b"CreationDate" not in content


def test_a_report_s_rates_are_its_own(evaluated, tmp_path):
    status, output = command("plot", evaluated, "--out", tmp_path / "f.pdf")
    assert (status, output) == (0, f"rates: {tmp_path / 'f.pdf'}, {tmp_path / 'f.csv'}")
    assert_for_print(tmp_path / "f.pdf", COLUMN)
    stored = json.loads((evaluated / "report.json").read_text())
    found = rows_of(tmp_path / "f.csv")
    assert len(found) == 8
    for row in found:
        suite, name = row["measure"].split(".")
        rate = stored[row["model"]][suite][name]
        assert [float(row[key]) for key in ("share", "low", "high")] == [rate["value"], *rate["ci95"]]
        assert int(row["n"]) == rate["n"]


def test_a_sweep_s_points_are_its_own(swept, tmp_path):
    plot(swept / "sweep.json", tmp_path / "f.pdf", width=5)
    assert_for_print(tmp_path / "f.pdf", 5)
    stored = json.loads((swept / "sweep.json").read_text())
    measured = {row["name"]: row for row in stored["variants"] if row["paired"]}
    found = rows_of(tmp_path / "f.csv")
    assert [row["edit"] for row in found] == list(measured)
    for row in found:
        paired = measured[row["edit"]]["paired"]
        assert float(row["removed"]) == -paired[stored["effect"]]["difference"]
        assert float(row["harm"]) == paired[stored["harm"]]["difference"]
        assert (row["pareto"] == "True") == (row["edit"] in stored["pareto"])


def test_a_run_s_edits_and_scores_are_its_own(run, tmp_path):
    status, output = command("plot", run, "--out", tmp_path / "f.pdf")
    assert status == 0
    assert "other figures (--figure NAME): candidates-dim" in output
    stored = json.loads((run / "candidates.json").read_text())
    unedited, *found = rows_of(tmp_path / "f.csv")
    assert float(unedited["left"]) == stored["trials"][0]["before"]
    assert [(float(row["left"]), float(row["kl"])) for row in found] == [(t["left"], t["kl"]) for t in stored["trials"]]
    listed = {int(row["pick"]): place for place, row in enumerate(found) if row["pick"]}
    assert [listed[number] for number in sorted(listed)] == stored["shortlist"]
    plot(run / "run.json", tmp_path / "c.pdf", figure="candidates-dim")
    assert_for_print(tmp_path / "c.pdf", PAGE)
    names = ("position", "layer", "bypass", "induce", "kl")
    mine = [[c[name] for name in names] for c in stored["candidates"] if c["method"] == "dim"]
    read = [[float(row[name]) if row[name] else None for name in names] for row in rows_of(tmp_path / "c.csv")]
    assert read == mine
    ends = [c["bypass_ci95"] or [None, None] for c in stored["candidates"] if c["method"] == "dim"]
    cells = [(row["bypass_low"], row["bypass_high"]) for row in rows_of(tmp_path / "c.csv")]
    assert [[float(cell) if cell else None for cell in row] for row in cells] == ends
    assert any(low is not None for low, _ in ends)


def test_every_figure_fits_its_page_and_has_numbers(run):
    found = figures_of(load_run(run))
    assert {"trials", "candidates-dim", "probes", "cosines", "inlp-accuracy", "projections-dim"} <= found.keys()
    for name, wanted in found.items():
        with paper_style():
            figure = wanted.draw()
            for_print(figure, wanted.width, wanted.height)
            figure.draw_without_rendering()
            drawn = figure.get_tightbbox()
            wide, high = figure.get_size_inches()
            plt.close(figure)
        assert min(drawn.x0, drawn.y0, wide - drawn.x1, high - drawn.y1) >= -0.02, (name, drawn, wide, high)
        heading, *rows = wanted.rows()
        assert rows, name
        assert {len(row) for row in rows} == {len(heading)}, name


def test_projections_are_those_of_the_stored_activations(run):
    """Each layer's mean difference separates the sides by twice their distance from the middle between them."""
    found = load_run(run)
    _, *rows = figures_of(found)["projections-dim"].rows()
    layers = {layer for layer, _, _ in rows}
    assert layers == set(range(1, found.info.layer_count + 1))
    for layer in layers:
        means = [
            sum(mine) / len(mine)
            for side in ("positive", "negative")
            if (mine := [value for where, which, value in rows if (where, which) == (layer, side)])
        ]
        assert means[0] == pytest.approx(-means[1])
        assert means[0] > 0


def test_the_same_figure_gives_the_same_bytes(evaluated, tmp_path):
    for kind in ("pdf", "svg"):
        once, again = tmp_path / f"once.{kind}", tmp_path / f"again.{kind}"
        plot(evaluated, once, force=True)
        plot(evaluated, again, force=True)
        assert once.read_bytes() == again.read_bytes()
    assert b"<text" not in once.read_bytes(), "letters are outlines, which need no font"


def test_what_cannot_be_drawn_or_written_is_one_line(evaluated, run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "there.csv").write_text("mine")
    ready = "--out", tmp_path / "f.pdf"
    for words, reason in (
        ((tmp_path / "nowhere", *ready), "no such file"),
        ((tmp_path / "empty", *ready), "is not a folder of extract, eval or sweep"),
        ((tmp_path / "other.json", *ready), "is not a report"),
        ((tmp_path / "broken.json", *ready), "is neither a report nor a sweep"),
        ((evaluated, "--out", tmp_path / "f.png"), "must end with .pdf or .svg"),
        ((evaluated, "--out", tmp_path / "none" / "f.pdf"), "there is no folder"),
        ((evaluated, "--out", tmp_path / "there.pdf"), "there.csv already exists"),
        ((run, *ready, "--figure", "nothing"), "has no figure 'nothing'; it has trials"),
    ):
        status, output = command("plot", *words)
        assert status == 1, words
        assert len(output.splitlines()) == 1, output
        assert output.startswith("error: "), output
        assert reason in output
    assert not list(tmp_path.glob("f.*"))
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert command("plot", evaluated, "--out", tmp_path / "there.pdf", "--force")[0] == 0
