"""Commands that publish: push."""

from __future__ import annotations

from pathlib import Path

import click

from ..options.common import path
from ..options.existing import CHECKPOINT


@click.command()
@click.argument("checkpoint", type=CHECKPOINT)
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make the repository public; by default it is private.")
@click.option("--report", type=path(), metavar="DIR", help="Folder written by eval, for the card.")
def push(checkpoint: Path, repository: str, public: bool, report: Path | None) -> None:
    """Upload an edited CHECKPOINT with its card to the Hub."""
    from ..push import push as run_push

    click.echo(run_push(checkpoint, repository, public=public, report=report))
