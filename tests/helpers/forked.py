"""Processes forked from one that has the slow libraries imported, so that each starts in a moment.

Unlike a process that was forked from the tests', such a process imports huggingface_hub and this package anew, so it
reads their environment as a user's would.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# What takes seconds to import, and does not import huggingface_hub.
SLOW = [
    "torch",
    "numba",
    "sklearn.linear_model",
    "scipy.stats",
    "pandas",
    "pyarrow",
    "pydantic",
    "rich.console",
    "httpx",
]
SECONDS = 120


def _begin(environment: Mapping[str, str], target: Callable[..., object], arguments: Sequence[Any]) -> None:
    assert "huggingface_hub" not in sys.modules, "its constants would be those of another environment"
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


def start(target: Callable[..., object], *arguments: Any, environment: Mapping[str, str]) -> BaseProcess:
    """Start a process that calls a function of a module, with these variables and no others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW)
    process = context.Process(target=_begin, args=(dict(environment), target, arguments))
    process.start()
    return process


def _run(words: Sequence[str], streams: Sequence[Path]) -> None:
    """Become `python -m orthogonalize WORDS`."""
    for number, file in enumerate(streams, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["orthogonalize", *words]
    code: object = 0
    try:
        runpy.run_module("orthogonalize", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def orthogonalize(words: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `orthogonalize WORDS` in this environment.

    Raises:
        TimeoutExpired: it takes more than two minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        process = start(_run, list(words), streams, environment=environment)
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(list(words), SECONDS)
        said = [file.read_text("utf-8") if file.exists() else "" for file in streams]
    return subprocess.CompletedProcess(list(words), process.exitcode, *said)
