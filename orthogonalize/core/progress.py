"""Progress bars for long work: silent in the library, shown once the command line asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

console = Console(stderr=True)
_shown = False


def show(on: bool = True) -> None:
    """Turn progress bars and notes on (the command line does) or off (the library's default)."""
    global _shown
    _shown = on


def note(text: str) -> None:
    """Tell the user one thing, where progress is shown."""
    if _shown:
        console.print(text, highlight=False, markup=False)


@contextmanager
def track(description: str, total: int | None, unit: str = "") -> Iterator[Callable[[int], None]]:
    """A bar that runs to `total`; yields the function that advances it. `unit` "bytes" counts as MB."""
    scale = 1e-6 if unit == "bytes" else 1.0
    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("MB" if unit == "bytes" else unit),
        TimeElapsedColumn(),
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
