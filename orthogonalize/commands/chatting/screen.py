"""What a chat shows: answers beside each other, as they are written; below each other where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ...core.errors import shown

LONGEST = 100_000  # characters of a line
Update = Callable[[int, str], None]
"""Called with the number of a side and all of its text so far."""


def visible(text: str) -> str:
    """Text of a model, line by line, in which control characters do nothing."""
    return "\n".join(shown(line.expandtabs(), LONGEST) for line in text.split("\n"))


class Screen:
    """Shows the answers of sides called `headings`."""

    def __init__(self, headings: Sequence[str], console: Console | None = None) -> None:
        self.headings = list(headings)
        self.console = console or Console(highlight=False)

    def line(self, text: str) -> None:
        """Print one line."""
        self.console.print(shown(text, LONGEST), markup=False, soft_wrap=True)

    @contextmanager
    def answers(self) -> Iterator[Update]:
        """In this context, show answers as they come; they stay on the screen.

        Without a terminal they are printed at the end, whole.
        """
        texts = [""] * len(self.headings)
        if not self.console.is_terminal:
            yield texts.__setitem__
            for heading, text in zip(self.headings, texts, strict=True):
                self.console.print(f"[{heading}]\n{visible(text)}", markup=False, soft_wrap=True)
            return
        with Live(console=self.console, transient=True, vertical_overflow="crop") as live:

            def update(side: int, text: str) -> None:
                texts[side] = text
                live.update(self._table(texts, most=self.console.height - 5))

            yield update
        self.console.print(self._table(texts))

    def _table(self, texts: Sequence[str], most: int | None = None) -> Table:
        """The answers beside each other; only the last `most` lines of each if not None."""
        table = Table(expand=True)
        width = max(1, self.console.width // len(texts) - 4)
        for heading in self.headings:
            table.add_column(heading, ratio=1, overflow="fold")
        cells = [Text(visible(text)) for text in texts]
        if most is not None:
            cells = [Text("\n").join(cell.wrap(self.console, width)[-max(1, most) :]) for cell in cells]
        table.add_row(*cells)
        return table
