"""Commands that are killed at random moments, each in a process forked from one that has everything imported.

That process has one Python thread when it forks, so that a child lacks nothing that a fresh process has.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from helpers.forked import start

SINGLE = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "RAYON")} | {"TOKENIZERS_PARALLELISM": "0"}
SECONDS = 600  # for one command


def do(job: dict[str, Any]) -> None:
    """Run one command of the package."""
    from orthogonalize.commands.edit import edit
    from orthogonalize.commands.evaluate import evaluate
    from orthogonalize.commands.extract import extract
    from orthogonalize.commands.push import push

    {"edit": edit, "extract": extract, "eval": evaluate, "push": push}[job["command"]](*job["words"], **job["options"])


def serve(jobs: Connection) -> None:
    """Fork a child per job; a job with `warm` runs in this process, so that its children need not import anything."""
    import torch
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    torch.set_num_threads(1)
    threadpool_limits(1)
    tqdm.monitor_interval = 0  # otherwise bars of libraries start a thread
    context = multiprocessing.get_context("fork")
    while (job := jobs.recv()) is not None:
        if job.pop("warm", False):
            do(job)
            jobs.send(threading.active_count())
            continue
        child = context.Process(target=do, args=(job,))
        child.start()
        jobs.send(child.pid)
        child.join()
        jobs.send(child.exitcode)


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
        self.jobs, theirs = multiprocessing.Pipe()
        self.process = start(serve, theirs, environment=self.environment)
        theirs.close()  # so that its death is noticed

    def warm(self, job: dict[str, Any]) -> float:
        """Run a job in the process that forks, which must have one thread afterwards; returns how long it took."""
        began = time.monotonic()
        self.jobs.send({**job, "warm": True})
        assert self.jobs.recv() == 1, "a fork would lack the other threads"
        return time.monotonic() - began

    def run(self, job: dict[str, Any], kill_after: float) -> int:
        """The exit code of a job's process, which is killed after so many seconds if it still runs."""
        self.jobs.send(job)
        child = self.jobs.recv()
        if not self.jobs.poll(kill_after):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return self.jobs.recv()

    def fresh(self, job: dict[str, Any]) -> int | None:
        """The exit code of a job in a process that imports everything anew, as a user would repeat it."""
        process = start(do, job, environment=self.environment)
        process.join(SECONDS)
        return process.exitcode

    def close(self) -> None:
        self.jobs.send(None)
        self.process.join(60)


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
