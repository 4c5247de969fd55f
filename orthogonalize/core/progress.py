"""Progress bars and notes: silent in the library, shown by the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console

from .errors import shown

Progress = Callable[[int], None]
"""Called with the amount of work done since the last call."""

console = Console(stderr=True)
_shown = False


def show(on: bool = True) -> None:
    """Turn progress bars and notes on (as the command line does) or off (the library's default)."""
    global _shown
    _shown = on


def note(*lines: str) -> None:
    """Print lines to the user, if progress is shown."""
    if _shown:
        for line in lines:
            console.print(shown(line, 2000), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def track(description: str, total: int | None, unit: str = "") -> Iterator[Progress]:
    """Show a progress bar up to `total`; yields the function that advances it.

    Args:
        description: the bar's label.
        total: the amount of work; None if unknown.
        unit: of `total`; "bytes" are shown as MB.
    """
    scale = 1e-6 if unit == "bytes" else 1.0
    with bars.Progress(
        bars.TextColumn("{task.description:<28}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("MB" if unit == "bytes" else unit),
        bars.TimeElapsedColumn(),
        console=console,
        disable=not _shown,
    ) as bar:
        size = None if total is None else max(1, round(total * scale))
        task = bar.add_task(description, total=size)
        done = 0.0

        def advance(count: int) -> None:
            nonlocal done
            done += count * scale
            bar.update(task, completed=round(done))

        yield advance
        if size is not None:
            bar.update(task, completed=size)
