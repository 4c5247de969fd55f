"""Run the command line in this process; extraction settings small enough for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from click.testing import CliRunner

from orthogonalize.cli import main
from orthogonalize.selection.settings import Settings

SMALL = Settings(train=12, val=4, test=6, filtered=False, behaviour_tokens=["sorry"], trials=4, max_rank=3)


UNTRIED = replace(SMALL, trials=0, max_rank=2)  # without trials of whole edits


def command(*words: str | Path) -> tuple[int, str]:
    """Run the command line; returns the exit status and the output (one line for a user's error)."""
    result = CliRunner().invoke(main, ["--quiet", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output.strip()
