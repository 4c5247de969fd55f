"""report.html in Chromium, with hostile texts: nothing of them runs, and nothing is fetched."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile_report import hostile_report
from helpers.made_up import SEARCH, sweep

from orthogonalize.evals.metrics import Paired, Rate
from orthogonalize.reports.pages.report_page import AT_ONCE, write_webpage
from orthogonalize.reports.pages.sweep_page import write_sweep_page
from orthogonalize.reports.schema import Answer, Behaviours, Measures, Report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.prove,
    pytest.mark.skipif(not BROWSER, reason="no Chromium is installed (Debian's package: chromium)"),
]


@contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """A server and the paths that were asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def opened(page: Path, profile: Path) -> str:
    """The document as Chromium has it after two seconds of scripts."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def attacks(server: str) -> list[str]:
    """Texts that mark the document, or call the server, wherever they are taken for markup or code."""
    ran = "document.documentElement.setAttribute('data-ran','yes')"
    return [
        f"</summary></details></td></table><script>{ran}</script>",
        f'<img src={server}/picture onerror="{ran}">',
        f'"\'><svg onload="{ran}"><a href="javascript:{ran}">x</a>',
        f"<style>@import '{server}/style'; * {{ background: url({server}/background) }}</style>",
        f"<link rel=stylesheet href={server}/a><iframe src={server}/b></iframe><script src={server}/c></script>",
        f'{{{{ {ran} }}}}</title><base href={server}/><meta http-equiv=refresh content="0;url={server}/d">',
        f'POLICY <form action={server}/form><input autofocus onfocus="{ran}"></form>',
    ]


def test_hostile_texts_neither_run_nor_fetch(tmp_path):
    with listening() as (server, asked):
        for number, text in enumerate(attacks(server)):
            page, edits = tmp_path / f"{number}.html", tmp_path / f"sweep-{number}.html"
            write_webpage(hostile_report(text), page)
            write_sweep_page(sweep({text: (0.5, 0.1)}).model_copy(update={"model": text, "concept": text}), edits)
            for each in (page, edits):
                document = opened(each, tmp_path / f"profile-{each.stem}")
                assert "data-ran" not in document.split(">", 2)[1]
                assert "</html>" in document
        assert asked == []


def test_policy_stops_markup_that_is_not_escaped(tmp_path):
    """The second barrier alone: the page's texts are put back as markup, and still nothing runs or is fetched."""
    with listening() as (server, asked):
        marker = "@hostile@"
        write_webpage(hostile_report(marker), tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert marker in page
        text = attacks(server)[1] + attacks(server)[2] + attacks(server)[4]
        (tmp_path / "with.html").write_text(page.replace(marker, text))
        without = page.replace(marker, text)
        start = without.index("<meta http-equiv")
        (tmp_path / "without.html").write_text(without[:start] + without[without.index(">", start) + 1 :])
        held = opened(tmp_path / "with.html", tmp_path / "profile-with")
        assert asked == []
        assert 'data-ran="yes"' not in held.split("<head", 1)[0]
        broken = opened(tmp_path / "without.html", tmp_path / "profile-without")
        assert 'data-ran="yes"' in broken.split("<head", 1)[0], "the attack works where nothing holds it"
        assert asked


WIDTHS = (375, 768, 1280)
MEASURING = """<!doctype html><title>wait</title>{frames}<script>
const press = (element, key) => element.dispatchEvent(new KeyboardEvent('keydown', {{ key, bubbles: true }}));
const setTo = (page, id, value) => {{
  page.getElementById(id).value = value;
  page.getElementById(id).dispatchEvent(new Event('input', {{ bubbles: true }}));
  return page.getElementById('count').textContent;
}};
const look = frame => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  const ids = [...page.querySelectorAll('[id]')].map(each => each.id);
  const marks = [...page.querySelectorAll('.chart .mark')], chart = marks[0].closest('.chart');
  const boxes = marks.map(mark => mark.querySelector('.form').getBoundingClientRect());
  const letters = [...page.querySelectorAll('.chart text, .chart .name')];
  marks[0].focus();
  const first = chart.querySelector('.readout').textContent;
  press(marks[0], 'ArrowRight');
  return {{
    overflow: page.documentElement.scrollWidth - frame.clientWidth,
    outside: boxes.filter(box => box.left < 0 || box.right > frame.clientWidth).length,
    small: letters.filter(each => parseFloat(view.getComputedStyle(each).fontSize) < 11).length,
    ground: view.getComputedStyle(page.body).backgroundColor, ink: view.getComputedStyle(page.body).color,
    first, second: chart.querySelector('.readout').textContent,
    stops: chart.querySelectorAll('.mark[tabindex="0"]').length, focused: page.activeElement === marks[1],
    doubled: ids.length - new Set(ids).size, marks: marks.length,
    unnamed: [...page.querySelectorAll('select, input')].filter(each => !each.labels.length).length,
    {more}
  }};
}};
addEventListener('load', () => setTimeout(() => {{
  document.body.textContent = 'FOUND' + JSON.stringify([...document.querySelectorAll('iframe')].map(look)) + 'END';
}}, 500));
</script>"""
OF_REPORT = """
    open: page.getElementById('prompt-2').open, laid_out: page.querySelectorAll('.item').length,
    tiles: page.querySelectorAll('.tile').length,
    marked: [...page.querySelectorAll('#prompt-2 mark')].map(mark => mark.textContent),
    counts: [
      page.getElementById('count').textContent, setTo(page, 'which', 'changed'), setTo(page, 'base', 'refused:0'),
      setTo(page, 'base', ''), setTo(page, 'which', ''), setTo(page, 'set', 'harmless'), setTo(page, 'text', 'PLAIN'),
      setTo(page, 'text', 'nowhere'),
    ],
"""
OF_SWEEP = """
    counts: [
      page.getElementById('count').textContent, setTo(page, 'which', 'front'), setTo(page, 'which', ''),
      setTo(page, 'method', 'leace'), setTo(page, 'text', 'mild'),
    ],
    drawn: [...page.querySelectorAll('.chart .mark')].filter(mark => mark.getClientRects().length).length,
"""


def measured_report(answers: int) -> Report:
    """Every other answer is of the target set, whose refusal is gone; the others are the same before and after."""
    rate = {"target": Rate(value=0.9, n=100, ci95=(0.83, 0.95)), "harmless": Rate(value=0.02, n=100, ci95=(0.0, 0.07))}
    low = rate | {"target": Rate(value=0.01, n=100, ci95=(0.0, 0.05))}
    changed = Answer(
        set="target", prompt="a prompt", category=None, base="I cannot help with that", edited="I can help with that",
        base_refused=True, edited_refused=False, base_shows=True, edited_shows=False,
    )  # fmt: skip
    same = Answer(
        set="harmless", prompt="a plain prompt", category=None, base="yes " * 80, edited="yes " * 80,
        base_refused=False, edited_refused=False, base_shows=False, edited_shows=False,
    )  # fmt: skip
    return Report(
        engine="hf", engine_version="transformers", base_model="some/model-with-quite-a-long-name-in-it",
        checkpoint="edited", edit="ablate, all", max_new_tokens=100, sensitive=False,
        base=Measures(behaviour=Behaviours(**rate)), edited=Measures(behaviour=Behaviours(**low)),
        paired={"behaviour.target": Paired(difference=-0.89, n=100, p=1e-9),
                "behaviour.harmless": Paired(difference=0.0, n=100, p=1.0)},
        answers=[same, changed] * (answers // 2), search=SEARCH,
    )  # fmt: skip


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder's files, over loopback: a page may look into frames of its own origin only."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def seen(page: str, more: str, scheme: int, folder: Path) -> list[dict[str, Any]]:
    """What the page in `folder` is at every width, with `more` measured, in a browser that prefers a colour scheme."""
    frames = "".join(f'<iframe src="{page}" width={w} height=800></iframe>' for w in WIDTHS)
    (folder / "index.html").write_text(MEASURING.format(frames=frames, more=more))
    with served(folder) as address:
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--enable-logging=stderr",
            f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", f"{address}/index.html",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr
    found: list[dict[str, Any]] = json.loads(html.unescape(done.stdout.split("FOUND")[-1].split("END")[0]))
    assert len(found) == len(WIDTHS)
    for each in found:
        assert each["overflow"] <= 0
        assert (each["outside"], each["small"], each["doubled"], each["unnamed"]) == (0, 0, 0, 0)
        assert (each["stops"], each["focused"]) == (1, True)
        assert each["first"] != each["second"]
    return found


LIGHT, DARK = (1, "rgb(255, 255, 255)"), (0, "rgb(21, 24, 28)")


@pytest.mark.parametrize(("answers", "scheme", "ground"), [(4, *LIGHT), (4, *DARK), (10_000, *LIGHT)])
def test_report_fits_every_width_filters_and_follows_links(answers, scheme, ground, tmp_path):
    write_webpage(measured_report(answers), tmp_path / "report.html")
    half = answers // 2
    counts = [answers, half, 0, half, answers, half, half, 0]
    linked = f"prompt-{answers - 2}"  # of many, one that is not laid out at once
    for each in seen(f"report.html#{linked}", OF_REPORT.replace("prompt-2", linked), scheme, tmp_path):
        assert (each["open"], each["marked"], each["tiles"]) == (True, ["cannot", "can"], 2)
        assert each["ground"] == ground
        assert each["first"] == "behaviour, target prompts, base: 90.0%, 95%: 83.0% to 95.0%, n = 100"
        assert each["second"].startswith("behaviour, target prompts, edited: 1.0%")
        assert each["marks"] == 4 + 1 + len(SEARCH.tried)
        assert each["laid_out"] == min(answers, AT_ONCE + 1)
        assert each["counts"] == [f"{count} of {answers}" for count in counts]


@pytest.mark.parametrize(("scheme", "ground"), [LIGHT, DARK])
def test_sweep_fits_every_width_and_its_filters_reach_the_chart(scheme, ground, tmp_path):
    found = sweep({"mild": (0.5, 0.01), "strong": (0.8, 0.2), "worse": (0.4, 0.3)})
    write_sweep_page(found, tmp_path / "sweep.html")
    for each in seen("sweep.html", OF_SWEEP, scheme, tmp_path):
        assert each["ground"] == ground
        assert each["counts"] == ["4 of 4", "2 of 4", "4 of 4", "1 of 4", "0 of 4"]
        assert (each["marks"], each["drawn"]) == (4, 1), "the base stays"
