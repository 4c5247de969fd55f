"""Commands that are killed at random moments, each in a process forked from one that has everything imported.

Run as a script, this module is that process: it reads jobs from stdin, forks one child per job and writes the child's
id and then its status. It has one Python thread when it forks, so that a child lacks nothing that a fresh process has.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SINGLE = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "RAYON")} | {"TOKENIZERS_PARALLELISM": "0"}


def do(job: dict[str, Any]) -> None:
    """Run one command of the package."""
    from orthogonalize.commands.edit import edit
    from orthogonalize.commands.evaluate import evaluate
    from orthogonalize.commands.extract import extract
    from orthogonalize.commands.push import push

    {"edit": edit, "extract": extract, "eval": evaluate, "push": push}[job["command"]](*job["words"], **job["options"])


def serve() -> None:
    """Fork a child per job; a job with `warm` runs in this process, so that its children need not import anything."""
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # otherwise bars of libraries start a thread
    for line in sys.stdin:
        job = json.loads(line)
        if job.pop("warm", False):
            do(job)
            print(threading.active_count(), flush=True)
            continue
        child = os.fork()
        if child == 0:
            code = 1
            try:
                do(job)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


@dataclass
class Killed:
    """What happened to the runs of one command."""

    kills: int = 0
    finished: int = 0
    left: list[int] = field(default_factory=list)  # entries beside the output after each kill


class Warm:
    """The process that forks, as its users see it."""

    def __init__(self, **environment: str) -> None:
        self.environment = {**os.environ, **SINGLE, **environment}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment,
        )  # fmt: skip

    def _tell(self, job: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()

    def _read(self) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that forks died"
        return int(line)

    def warm(self, job: dict[str, Any]) -> float:
        """Run a job in the process that forks, which must have one thread afterwards; returns how long it took."""
        began = time.monotonic()
        self._tell({**job, "warm": True})
        assert self._read() == 1, "a fork would lack the other threads"
        return time.monotonic() - began

    def run(self, job: dict[str, Any], kill_after: float) -> int:
        """The status of a job's process (see `os.waitpid`), which is killed after so many seconds if it still runs."""
        self._tell(job)
        child = self._read()
        time.sleep(kill_after)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        return self._read()

    def fresh(self, job: dict[str, Any]) -> int:
        """The status of a job in a process that was not forked, as a user would repeat it."""
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(job, default=str)], env=self.environment, check=False, timeout=600
        )
        return done.returncode

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


@contextmanager
def warm_process(**environment: str) -> Iterator[Warm]:
    process = Warm(**environment)
    try:
        yield process
    finally:
        process.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, followed through links; hidden ones too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def moments(count: int, longest: float, seed: int = 0) -> Iterator[float]:
    """Random moments of a run, in seconds."""
    generator = random.Random(seed)
    return (generator.uniform(0, longest) for _ in range(count))


if __name__ == "__main__":
    do(json.loads(sys.argv[1])) if sys.argv[1:] else serve()
