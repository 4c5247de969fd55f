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

import pytest
from helpers.hostile_report import hostile_report

from orthogonalize.evals.metrics import Paired, Rate
from orthogonalize.reports.html import write_webpage
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
            page = tmp_path / f"{number}.html"
            write_webpage(hostile_report(text), [], page)
            document = opened(page, tmp_path / f"profile-{number}")
            assert "data-ran" not in document.split(">", 2)[1]
            assert "</html>" in document
        assert asked == []


def test_policy_stops_markup_that_is_not_escaped(tmp_path):
    """The second barrier alone: the page's texts are put back as markup, and still nothing runs or is fetched."""
    with listening() as (server, asked):
        marker = "@hostile@"
        write_webpage(hostile_report(marker), [], tmp_path / "page.html")
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


WIDTHS = (375, 820, 1400)
MEASURING = """<!doctype html><title>wait</title>{frames}<script>
addEventListener('load', () => setTimeout(() => {{
  const found = [...document.querySelectorAll('iframe')].map(frame => {{
    const page = frame.contentDocument, item = page.getElementById('prompt-2');
    const style = frame.contentWindow.getComputedStyle(page.body);
    return {{
      overflow: page.documentElement.scrollWidth - frame.clientWidth, open: item.open, ground: style.backgroundColor,
      marks: [...item.querySelectorAll('mark')].map(mark => mark.textContent),
      tiles: page.querySelectorAll('.tile').length, count: page.getElementById('count').textContent,
    }};
  }});
  document.body.textContent = 'FOUND' + JSON.stringify(found) + 'END';
}}, 500));
</script>"""


def measured_report(answers: int) -> Report:
    rate = {"target": Rate(value=0.9, n=100, ci95=(0.83, 0.95)), "harmless": Rate(value=0.02, n=100, ci95=(0.0, 0.07))}
    low = rate | {"target": Rate(value=0.01, n=100, ci95=(0.0, 0.05))}
    answer = Answer(
        set="target", prompt="a prompt", category=None, base="I cannot help with that", edited="I can help with that",
        base_refused=True, edited_refused=False,
    )  # fmt: skip
    return Report(
        engine="hf", engine_version="transformers", base_model="some/model-with-quite-a-long-name-in-it",
        checkpoint="edited", edit="ablate, all", max_new_tokens=100, sensitive=False,
        base=Measures(behaviour=Behaviours(**rate)), edited=Measures(behaviour=Behaviours(**low)),
        paired={"behaviour.target": Paired(difference=-0.89, n=100, p=1e-9),
                "behaviour.harmless": Paired(difference=0.0, n=100, p=1.0)},
        answers=[answer] * answers,
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


@pytest.mark.parametrize(("scheme", "ground"), [(1, "rgb(255, 255, 255)"), (0, "rgb(21, 24, 28)")])
@pytest.mark.parametrize("answers", [3, 10_000])
def test_page_fits_every_width_marks_words_and_follows_links(answers, scheme, ground, tmp_path):
    write_webpage(measured_report(answers), [], tmp_path / "report.html")
    frames = "".join(f'<iframe src="report.html#prompt-2" width={w} height=800></iframe>' for w in WIDTHS)
    (tmp_path / "index.html").write_text(MEASURING.format(frames=frames))
    with served(tmp_path) as address:
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--enable-logging=stderr",
            f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", f"{address}/index.html",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(done.stdout.split("FOUND")[-1].split("END")[0]))
    assert [each["overflow"] <= 0 for each in found] == [True] * len(WIDTHS)
    for each in found:
        assert (each["open"], each["marks"], each["tiles"]) == (True, ["cannot", "can"], 2)
        assert each["ground"] == ground
        assert each["count"] == f"{answers} of {answers}"
