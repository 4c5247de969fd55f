"""Commands that measure with an engine: eval, sweep, judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...core.output_folders import REPORT, SWEEP
from .._console import show_judged, show_report, show_sweep
from ..options.common import (
    ListingOption,
    choice,
    converted_by,
    description_option,
    engine_option,
    engine_options,
    grid_options,
    hf_device_option,
    json_option,
    measuring_options,
    method_listing,
    named_sources,
    other_base_option,
    out_option,
    parallel_options,
    revision_option,
    scope_names,
    sweep_grid,
    track_option,
    words,
)
from ..options.effective import save_config
from ..options.existing import CHECKPOINT, FILE_OR_FOLDER, JUDGE, MODEL, RUN_FOLDER
from ..options.pages import Command
from .as_json import echo_json, without_answers


@click.command("eval", cls=Command)
@click.argument("checkpoint", type=CHECKPOINT)
@click.option("--base", type=MODEL, required=True, metavar="MODEL", help="The model that was edited.")
@click.option("--run", type=RUN_FOLDER, required=True, help="The run whose test prompts are used.")
@out_option(REPORT)
@measuring_options
@click.option(
    "--prompts",
    multiple=True,
    metavar="[NAME=]FILE",
    callback=converted_by(named_sources),
    help="Your own prompts, measured beside the run's; repeatable.",
)
@click.option("--separate-engines", is_flag=True, help="Start vLLM for each model instead of swapping weights in one.")
@click.option(
    "--card/--no-card", default=True, help="Whether to write the measures into the checkpoint's card as well (default)."
)
@click.option("--redact", is_flag=True, help="Leave sensitive prompts and their answers out of the report.")
@other_base_option
@revision_option
@track_option
@json_option
def eval_(checkpoint: Path, base: str, run: Path, out: Path, as_json: bool, track: str | None, **options: Any) -> None:
    """Measure base and edited side by side: behaviour, over-refusal, judges, and what the edit cost.

    The default suites need only the run's data; public sets are read from the Hub, or from --data. Re-run an
    interrupted evaluation to resume it.
    """
    from ...reports.trackers.metrics import track_result
    from ..evaluate import evaluate

    engine = engine_options(options)
    report = evaluate(checkpoint, base, run, out, options=engine, **options)
    save_config(out)
    if track is not None:
        track_result(track, report, out)
    if as_json:
        echo_json(without_answers(report, out))
        return
    show_report(report)
    click.echo(f"report: {out / 'report.html'}")


@click.command(cls=Command)
@click.argument("model", type=MODEL)
@click.option("--run", type=RUN_FOLDER, required=True, help="The run whose directions and test prompts are used.")
@out_option(SWEEP)
@click.option(
    "--methods",
    cls=ListingOption,
    listing=method_listing,
    callback=converted_by(words),
    help="Edit methods; default: all that the run has directions for.",
)
@click.option(
    "--scopes",
    callback=converted_by(scope_names),
    default="",
    help="Scopes, as edit takes them, except from:. Default: one,top:50%,all; one for methods that add a constant.",
)
@grid_options
@choice("--semantics", ["weights", "residual"], "weights", "residual: the reference's hooks; needs --engine hf.")
@measuring_options
@other_base_option
@description_option
@revision_option
@track_option
@json_option
def sweep(model: str, run: Path, out: Path, as_json: bool, track: str | None, **options: Any) -> None:
    """Measure every method over every scope, in one engine: the comparison table.

    The engine starts once and swaps in each edit's weights, if it can; otherwise each edit gets its own engine. Re-run
    an interrupted sweep to resume it.
    """
    from ...reports.trackers.metrics import track_result
    from ..sweep import sweep as run_sweep

    grid, engine = sweep_grid(options), engine_options(options)
    found = run_sweep(model, run, out, grid=grid, options=engine, **options)
    save_config(out)
    if track is not None:
        track_result(track, found, out)
    if as_json:
        echo_json({"sweep": str(out), **found.model_dump()})
        return
    show_sweep(found)
    click.echo(f"sweep: {out / 'sweep.html'}")


@click.command(cls=Command)
@click.argument("file", type=FILE_OR_FOLDER)
@click.option(
    "--judge",
    "name",
    type=JUDGE,
    default="prefix",
    show_default=True,
    help="prefix (by wording), wildguard, …, NAME=MODEL, or endpoint:URL#MODEL.",
)
@json_option
@engine_option
@parallel_options
@hf_device_option
def judge(file: Path, name: str, as_json: bool, engine: Any, **options: Any) -> None:
    """Score answers made earlier: FILE is a report of eval, or a JSON list of {prompt, response, category}.

    The answers of a report are scored for both models, by prompt set, without generating them again.
    """
    from ..judge import judge as run_judge

    found = run_judge(file, name, engine=engine, options=engine_options(options))
    if as_json:
        echo_json(found.model_dump(exclude_none=True))
    else:
        show_judged(found)
