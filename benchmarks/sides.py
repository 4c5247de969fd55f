"""Run the sides of a comparison in a process each, and print the result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MARK = "result: "  # vLLM logs on standard output too


def tell(result: Any) -> None:
    """Print a side's result, in its own process."""
    print(MARK + json.dumps(result), flush=True)


def hear(script: str, *words: object) -> Any:
    """The result that `script` prints when run with `words`."""
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)))


def show(result: dict[str, Any], out: Path | None) -> None:
    """Print the result as JSON, and write it to `out` if given."""
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")
