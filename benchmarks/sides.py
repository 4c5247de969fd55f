"""The sides of a comparison, each in a process of its own, and what is printed of the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MARK = "result: "  # vLLM logs on standard output too


def tell(result: Any) -> None:
    """Say, in the process of a side, what it measured."""
    print(MARK + json.dumps(result), flush=True)


def hear(script: str, *words: object) -> Any:
    """What `script`, run with `words`, tells."""
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)))


def show(result: dict[str, Any], out: Path | None) -> None:
    """Print the whole, and write it to `out` where that is given."""
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")
