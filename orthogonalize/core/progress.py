"""Progress and notes: silent in the library, shown by the command line.

On a terminal, progress is a bar with a rate and the time left; elsewhere, as in a log, a line every ten seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console
from rich.table import Column

from .errors import shown

Progress = Callable[[int], None]
"""Called with the amount of work done since the last call."""

EVERY = 10.0  # seconds between the lines of a log
BRIEF = 2.0  # seconds of waiting that are not worth a line
console = Console(stderr=True)
logger = logging.getLogger("orthogonalize")
_shown = False


def show(on: bool = True) -> None:
    """Turn progress and notes on (as the command line does) or off (the library's default)."""
    global _shown
    _shown = on


def is_shown() -> bool:
    """Whether progress and notes are shown."""
    return _shown


def note(*lines: str) -> None:
    """Print lines to the user, if progress is shown, and log them; a line is never broken, so that paths stay whole."""
    for line in lines:
        logger.info(shown(line, 2000))
        if _shown:
            console.print(shown(line, 2000), highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time in words, such as `48 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def pace(done: float, total: float | None, seconds: float) -> str:
    """The rate of work, and the time left at that rate; empty before anything is done.

    Args:
        done, total: amounts of work; the total may be unknown.
        seconds: what `done` took.
    """
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    speed = f"{rate:.3g} per s" if rate >= 1 else f"{1 / rate:.3g} s each"
    return speed if total is None else f"{speed}, {duration(max(0.0, total - done) / rate)} left"


class _PaceColumn(bars.ProgressColumn):
    """The rate, and the time left."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: bars.Task) -> str:
        return "" if task.finished else pace(task.completed, task.total, task.elapsed or 0.0)


class _Work:
    """An amount of work and how much of it is done; `changed` is called when that changes."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.started = 0.0, time.monotonic()
        self.changed: Callable[[], None] = lambda: None

    def advance(self, amount: float) -> None:
        self.done += amount
        self.changed()

    @property
    def seconds(self) -> float:
        """The time since it began."""
        return time.monotonic() - self.started

    def line(self) -> str:
        """How far it is, as a line of a log."""
        of = "" if self.total is None else f" of {round(self.total)}"
        details = [duration(self.seconds), pace(self.done, self.total, self.seconds)]
        amount = f": {round(self.done)}{of} {self.unit}".rstrip() if self.counts else ""
        return f"{self.description}{amount} ({', '.join(filter(None, details))})"

    def last_line(self) -> str:
        """What was done, as a line of a log."""
        amount = f": {round(self.done)} {self.unit}".rstrip() if self.counts else ""
        return f"{self.description}{amount} in {duration(self.seconds)}"

    @property
    def counts(self) -> bool:
        """Whether there is anything to count, and not only to wait for."""
        return self.total is not None or self.done > 0


@contextmanager
def _logged(work: _Work) -> Iterator[None]:
    """A line every ten seconds, from a thread, so that a long step is seen to run; and one at the end."""
    over = threading.Event()

    def write() -> None:
        while not over.wait(EVERY):
            note(work.line())

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join()
    if work.counts or work.seconds >= BRIEF:
        note(work.last_line())


@contextmanager
def _drawn(work: _Work) -> Iterator[None]:
    """A bar."""
    with bars.Progress(
        bars.TextColumn("{task.description:<26}"),
        bars.BarColumn(bar_width=10),  # so that all fits into a line of 80 characters
        bars.MofNCompleteColumn(),
        bars.TextColumn(work.unit),
        bars.TimeElapsedColumn(),
        _PaceColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(work.description, total=work.total)
        work.changed = lambda: bar.update(task, completed=round(work.done))
        yield


@contextmanager
def track(description: str, total: int | None, unit: str = "") -> Iterator[Progress]:
    """Show progress up to `total`; yields the function that advances it.

    Args:
        description: what is done.
        total: the amount of work; None if unknown.
        unit: of `total`; "bytes" are shown as MB.
    """
    scale = 1e-6 if unit == "bytes" else 1.0
    size = None if total is None else max(1.0, total * scale)
    work = _Work(description, size, "MB" if unit == "bytes" else unit)

    def advance(count: int) -> None:
        work.advance(count * scale)

    if not _shown:
        yield advance
        return
    with _drawn(work) if console.is_terminal else _logged(work):
        yield advance
        if size is not None:
            work.advance(size - work.done)
