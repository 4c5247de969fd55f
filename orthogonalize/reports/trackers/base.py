"""What a tracker is: it takes numbers by name. It is never given prompts, answers, paths or the names of users."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Facts = Mapping[str, str | int | float | bool]
"""What was done, as public names and numbers."""


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add numbers by name, at one step."""

    def close(self) -> None:
        """Store everything."""


@dataclass(frozen=True)
class TrackedRun:
    """What is tracked.

    Attributes:
        job: the command: extract, eval or sweep.
        name: the name of its output folder.
        folder: where files of a tracker that writes some belong.
        facts: what was done.
    """

    job: str
    name: str
    folder: Path
    facts: Facts


@dataclass(frozen=True)
class TrackerEntry:
    """One value of `--track`.

    Args:
        name: that value.
        summary: where the numbers go.
        module: what must be importable; else `install` is the advice.
        open: begins a run.
    """

    name: str
    summary: str
    module: str
    install: str
    open: Callable[[TrackedRun], Tracker]
