"""The width of printed tables, and their encoding."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from orthogonalize.commands import _console

LONG = "a measure whose name is much longer than any terminal of that width would show"
PRINT = (
    "from rich.table import Table; from orthogonalize.commands._console import console; "
    f"t = Table(); t.add_row({LONG!r}); console.print(t)"
)


@pytest.mark.parametrize(
    ("encoding", "form"), [("ascii", ()), ("ascii", ("--json",)), ("cp1252", ()), ("utf-8", ())], ids=str
)
def test_what_a_stream_cannot_write_becomes_a_question_mark(encoding, form, tmp_path):
    answer = {"prompt": "a", "response": "I cannot \U0001f600", "category": "caf\u00e9 \U0001f600"}
    (tmp_path / "answers.json").write_text(json.dumps([answer]))
    printed = subprocess.run(
        [sys.executable, "-m", "orthogonalize", "judge", tmp_path / "answers.json", *form],
        capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    ).stdout.decode("utf-8")  # fmt: skip
    whole = encoding == "utf-8" or form  # click writes UTF-8 wherever it can, and JSON is
    assert ("caf\u00e9 \U0001f600" if whole else "caf? ?") in printed


def test_a_pipe_gets_whole_lines_whatever_terminal_its_parent_had():
    environment = {**os.environ, "COLUMNS": "40", "LINES": "10"}
    printed = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, env=environment, check=True)
    assert LONG in printed.stdout


def test_tables_show_texts_from_files_as_they_are(monkeypatch):
    """A name is no markup, no escape sequence and no line of its own."""
    hostile = "[red]name\x1b[31m\nnext"
    written = io.StringIO()
    monkeypatch.setattr(_console, "console", Console(file=written, width=400))
    candidate = SimpleNamespace(
        finder=hostile, position=-1, layer=0, bypass=0.0, induce=0.0, kl=0.0, global_bypass=None, failed=(hostile,),
        bypass_ci95=(-0.1, 0.1), induce_ci95=None, kl_ci95=None,
    )  # fmt: skip
    audit = SimpleNamespace(
        mismatches=[hostile], changed={}, added=[hostile], missing=[hostile], same=0, config={hostile: (hostile, 1)},
        side_files=[hostile], notes={hostile: hostile}, verification=None, verdict=lambda: hostile,
    )  # fmt: skip
    info = SimpleNamespace(
        base_score={"positive": 1.0, "negative": -1.0}, base_score_ci95={}, position_name=lambda _: hostile
    )
    _console.show_candidates([candidate], info)
    _console.show_audit(audit)
    assert "\x1b" not in written.getvalue()
    assert written.getvalue().count("[red]name\\x1b[31m\\nnext") >= 8


def test_lines_outside_tables_never_break_a_path(monkeypatch):
    path = "/some/where/far/away/from/here/and yet further/model"
    monkeypatch.setattr(_console, "console", type(_console.console)(width=20))
    with _console.console.capture() as printed:
        _console._show_mismatches([f"the base is not {path}"])
    assert path in printed.get()
