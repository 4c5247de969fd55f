"""Commands that publish: push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..options.existing import CHECKPOINT, REPOSITORY
from ..options.pages import Command
from ..options.push import push_options


@click.command(cls=Command)
@click.argument("checkpoint", type=CHECKPOINT)
@click.argument("repository", type=REPOSITORY, metavar="OWNER/NAME")
@push_options
def push(checkpoint: Path, repository: str, no_verify: bool, **options: Any) -> None:
    """Upload an edited CHECKPOINT or adapter with its card to the Hub.

    It is verified first, if it was not yet. Re-run an interrupted upload to resume it: the Hub keeps what it has, and
    nothing is visible there before the end.
    """
    from ..push import push as run_push

    click.echo(run_push(checkpoint, repository, verify=not no_verify, **options))
