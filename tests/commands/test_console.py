"""The width of printed tables."""

from __future__ import annotations

import os
import subprocess
import sys

LONG = "a measure whose name is much longer than any terminal of that width would show"
PRINT = (
    "from rich.table import Table; from orthogonalize.commands._console import console; "
    f"t = Table(); t.add_row({LONG!r}); console.print(t)"
)


def test_a_pipe_gets_whole_lines_whatever_terminal_its_parent_had():
    environment = {**os.environ, "COLUMNS": "40", "LINES": "10"}
    printed = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, env=environment, check=True)
    assert LONG in printed.stdout
