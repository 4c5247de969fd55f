"""Commands that show the tool at work: demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...core.output_folders import DEMO
from .._console import show_report
from ..options.common import engine_option, force_option, json_option
from ..options.effective import save_config
from ..options.existing import NewFolder
from ..options.pages import Command
from .as_json import demonstrated, echo_json


@click.command(cls=Command)
@click.option("--out", type=NewFolder(DEMO), default=Path("demo"), show_default=True, help="Folder for all output.")
@click.option(
    "--goal", type=click.Choice(["remove", "calibrate"]), default="remove", show_default=True,
    help="calibrate plants a refusal of astronomy as well, and keeps it.",
)  # fmt: skip
@engine_option
@force_option("Replace an earlier demo in OUT.")
@json_option
def demo(out: Path, goal: str, engine: Any, force: bool, as_json: bool) -> None:
    """Run the full pipeline on the embedded 135M model: plant a refusal of cooking, find it, remove it, measure."""
    from ..demo import demo as run_demo

    result = run_demo(out, goal=goal, engine=engine, force=force)
    save_config(out)
    if as_json:
        echo_json(demonstrated(result, out))
        return
    click.echo(f"edit: {result.recipe.choice.describe()}")
    click.echo(f"hooks = weights: largest logit difference {result.verification.hooks_gap:.1e}")
    show_report(result.report)
    click.echo(f"model card: {out / 'edited' / 'README.md'}")
    click.echo(f"report: {result.page}")
