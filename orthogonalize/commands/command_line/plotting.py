"""Commands that draw: plot."""

from __future__ import annotations

from pathlib import Path

import click

from ..options.existing import FILE_OR_FOLDER, NEW_FILE
from ..options.pages import Command


@click.command(cls=Command)
@click.argument("source", type=FILE_OR_FOLDER, metavar="RUN|REPORT|SWEEP")
@click.option(
    "--out", type=NEW_FILE, required=True, help="File to create, .pdf or .svg; its numbers go beside it as .csv."
)
@click.option("--figure", metavar="NAME", help="Figure of a run: trials, candidates-dim, probes, cosines, …")
@click.option(
    "--width", type=click.FloatRange(1, 20), metavar="INCHES",
    help="Default: 3.35 (one column of two), or 6.9 (both) for several panels.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace OUT and its .csv.")
def plot(source: Path, out: Path, figure: str | None, width: float | None, force: bool) -> None:
    """Draw a figure of a run, a report or a sweep for a paper: vector graphics, and the numbers as CSV.

    Give a folder made by extract, eval or sweep, or its JSON file. Fonts are embedded, and the title is left to the
    caption.
    """
    from ..plot import plot as run_plot

    made = run_plot(source, out, figure=figure, width=width, force=force)
    click.echo(f"{made.name}: {made.file}, {made.data}")
    if made.others and figure is None:
        click.echo(f"other figures (--figure NAME): {', '.join(made.others)}")
