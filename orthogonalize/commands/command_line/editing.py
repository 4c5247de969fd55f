"""Commands that write weights: edit, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...core.errors import shown
from ...core.output_folders import EDITED
from ...core.words import counted
from ..options.common import out_option
from ..options.edit import edit_options
from ..options.effective import save_config
from ..options.existing import ADAPTER, MODEL
from ..options.pages import Command


@click.command(cls=Command)
@click.argument("model", type=MODEL)
@edit_options
def edit(model: str, out: Path | None, cache: str | None, **options: Any) -> None:
    """Write a copy of MODEL with a direction edited out of (or into) its weights.

    With --run alone, this makes the best edit that extract tried; with --pick N, number N of those that it lists. Both
    are taken whole. Any other option, --method included, makes a new edit: what you give, along the run's best
    direction for that method, and the defaults for the rest: --method ablate, --scope all (one for actadd), --strength
    1. What was taken from where is printed.
    """
    from ..edit import edit as run_edit
    from ..edit import readers

    recipe = run_edit(model, out, cache=cache, **options)
    save_config(out)
    where = f"{cache} in the Hub's cache" if out is None else str(out)
    described = shown(recipe.choice.describe(), 1000)
    if options["format"] == "lora":
        click.echo(f"{described}; adapter: {where}")
        return
    if out is not None and not out.exists():
        click.echo(f"{described}: share {options['shard']} written; {out} appears with the last share")
        return
    click.echo(
        f"{described}: {counted(len(recipe.tensors), 'tensor')} edited, {len(recipe.added)} added; checkpoint: {where}"
    )
    for line in readers(recipe, cache or str(out)):
        click.echo(line)


@click.command(cls=Command)
@click.argument("adapter", type=ADAPTER)
@click.option("--base", type=MODEL, metavar="MODEL", help="The model that it adapts; default: the one that it names.")
@out_option(EDITED)
def merge(adapter: Path, base: str | None, out: Path, force: bool) -> None:
    """Merge a LoRA ADAPTER, of edit --format lora or any other, into its base.

    verify and eval take an adapter as well, and merge it into the cache of converted models. push uploads it as it is.
    """
    from ..merge import merge as run_merge

    click.echo(f"checkpoint: {run_merge(adapter, out, base=base, force=force)}")
