"""The options before a command: --debug, --verbose; the commands that the group lists."""

from __future__ import annotations

import os

import click
from click.testing import CliRunner

from orthogonalize.cli import main
from orthogonalize.core.errors import OrthogonalizeError

FAILING = ["compare", "nowhere", "nowhere-else"]


def test_debug_keeps_the_traceback_of_what_is_otherwise_one_line():
    plain = CliRunner().invoke(main, FAILING)
    assert (plain.exit_code, type(plain.exception)) == (1, SystemExit)
    assert plain.stderr.startswith("error: ")
    assert len(plain.stderr.strip().splitlines()) == 1
    assert isinstance(CliRunner().invoke(main, ["--debug", *FAILING]).exception, OrthogonalizeError)


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
