"""The options before a command: --debug, --verbose; the commands that the group lists."""

from __future__ import annotations

import logging
import os
import warnings
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from orthogonalize.cli import main
from orthogonalize.commands.command_line.debugging import LOG
from orthogonalize.core import progress
from orthogonalize.core.errors import OrthogonalizeError

BARS = {"TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"}
FAILING = ["compare", "one.json", "two.json"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of its own, for the log, with two files that are no reports."""
    monkeypatch.chdir(tmp_path)
    for file in FAILING[1:]:
        (tmp_path / file).write_text("{}")
    return tmp_path


def test_debug_keeps_the_traceback_of_what_is_otherwise_one_line():
    plain = CliRunner().invoke(main, FAILING)
    assert (plain.exit_code, type(plain.exception)) == (1, SystemExit)
    assert plain.stderr.startswith("error: ")
    assert len(plain.stderr.strip().splitlines()) == 1
    assert isinstance(CliRunner().invoke(main, ["--debug", *FAILING]).exception, OrthogonalizeError)


def test_debug_writes_a_log_with_notes_warnings_and_the_traceback(here, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hf_do_not_tell")

    def failing(**_):
        progress.note("read from https://me:secret@host/x")
        logging.getLogger("vllm").warning("sent hf_do_not_tell")
        logging.getLogger("vllm").warning("called \x1b[31m\r\n2026-01-01 INFO orthogonalize: forged")
        warnings.warn("beware", stacklevel=1)
        raise OrthogonalizeError("it broke with hf_do_not_tell")

    monkeypatch.setattr(main.commands["compare"], "callback", failing)
    shown = CliRunner().invoke(main, ["--debug", *FAILING])
    assert f"log: {here / LOG}" in "".join(shown.stderr.splitlines())
    log = (here / LOG).read_text()
    for expected in (
        "read from https://***@host/x",
        "sent ***",
        "beware",
        "Traceback",
        "it broke with ***",
        "Python 3.",
    ):
        assert expected in log
    assert "hf_do_not_tell" not in log
    assert all(line.isprintable() for line in log.splitlines())
    assert not [line for line in log.splitlines() if line.startswith("2026-01-01 INFO")]
    assert logging.getLogger("vllm").handlers == []
    CliRunner().invoke(main, FAILING)
    assert (here / LOG).read_text() == log, "without --debug nothing is logged"


def test_a_log_that_cannot_be_written_stops_nothing(here, monkeypatch):
    (here / LOG).mkdir()
    monkeypatch.setattr(main.commands["compare"], "callback", lambda **_: print("done"))
    shown = CliRunner().invoke(main, ["--debug", *FAILING])
    assert (shown.exit_code, shown.stdout) == (0, "done\n")
    assert "cannot be written" in shown.stderr


def test_quiet_leaves_the_answer_and_no_note(monkeypatch):
    def noting(**_):
        progress.note("a note")
        print("the answer")

    monkeypatch.setattr(main.commands["compare"], "callback", noting)
    assert CliRunner().invoke(main, ["--quiet", *FAILING]).output == "the answer\n"
    assert CliRunner().invoke(main, FAILING).stderr == "a note\n"


def test_verbose_leaves_the_libraries_logs_as_they_are(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("VLLM_LOGGING_LEVEL", None)
    CliRunner().invoke(main, ["--verbose", *FAILING])
    assert "VLLM_LOGGING_LEVEL" not in os.environ
    CliRunner().invoke(main, FAILING)
    assert os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"


def test_the_help_lists_every_command_and_each_explains_itself():
    context = click.Context(main)
    assert {"extract", "edit", "eval", "push", "verify", "sweep", "rank"} <= set(main.list_commands(context))
    for name in main.list_commands(context):
        shown = CliRunner().invoke(main, [name, "--help"])
        assert shown.exit_code == 0, shown.output
        assert f"Usage: main {name}" in shown.output


@pytest.mark.parametrize(("words", "terminal", "bars"), [
    (["push", "nowhere", "me/x"], True, True), (["push", "nowhere", "me/x"], False, False),
    (["--quiet", "push", "nowhere", "me/x"], True, False), (FAILING, True, False),
])  # fmt: skip
def test_only_an_upload_on_a_terminal_has_the_bars_of_the_hubs_client(words, terminal, bars, monkeypatch):
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in BARS})
    monkeypatch.setattr(
        "orthogonalize.cli.sys", SimpleNamespace(argv=[], stderr=SimpleNamespace(isatty=lambda: terminal))
    )
    CliRunner().invoke(main, words)
    assert not BARS & os.environ.keys() if bars else os.environ.keys() >= BARS
