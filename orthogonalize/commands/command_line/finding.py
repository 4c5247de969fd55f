"""Commands that find and describe: extract, rank, describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...core import progress
from ...core.errors import OrthogonalizeError
from .._console import show_candidates, show_run
from ..options.common import json_option, number, parallel_engine_options, revision_option, track_option
from ..options.effective import save_config
from ..options.existing import MODEL, NEW_FILE, RUN_FOLDER
from ..options.extract import extract_options
from ..options.pages import Command
from .as_json import echo_json, ranking, summary


@click.command(cls=Command)
@click.argument("model", type=MODEL)
@extract_options
@track_option
@json_option
def extract(model: str, out: Path, as_json: bool, track: str | None, **options: Any) -> None:
    """Find where MODEL represents a contrast, and which edit removes it at the least cost.

    There are five stages: prompts, activations, directions, answers, selection. Those whose inputs are unchanged are
    kept, so re-running the command resumes an interrupted run.
    """
    from ...reports.trackers.metrics import track_result
    from ..extract import extract as run_extract

    options["engine_options"] = parallel_engine_options(options)
    judge = options.pop("judge")
    if judge and options["measure"] != "auto":
        raise OrthogonalizeError("--judge NAME is short for --measure judge:NAME; give one of them")
    run = run_extract(model, out, **options | ({"measure": f"judge:{judge}"} if judge else {}))
    save_config(out)
    if track is not None and run is not None:
        track_result(track, run, out)
    if as_json:
        echo_json(summary(run, out))
        return
    if run is None:
        click.echo(f"run: {out} (unfinished; run extract without --stage to finish it)")
        return
    show_candidates(run.candidates, run.info)
    show_run(run)
    click.echo(f"run: {out}")


@click.command("rank", cls=Command)
@click.argument("run", type=RUN_FOLDER)
@click.option("--kl", type=float, default=0.1, show_default=True, help="Maximum KL on the other side, nats.")
@click.option("--induce", type=float, default=0.0, show_default=True, help="Minimum score when added, log-odds.")
@click.option(
    "--prune",
    type=click.FloatRange(0, 1),
    default=0.2,
    show_default=True,
    help="Fraction of the last layers to exclude.",
)
@number("--most", 1, 10, "Candidates to show per finder.")
@click.option("--write", is_flag=True, help="Store the new ranks in RUN; edit uses them once given any option.")
@json_option
def rank_(run: Path, kl: float, induce: float, prune: float, most: int, write: bool, as_json: bool) -> None:
    """Filter and rank the directions of RUN again by their stored scores, without the model.

    The trials of whole edits are kept, so edit with --run alone still makes the best trial. With any other option, such
    as --method, it starts from the best direction by the stored ranks.
    """
    from ...selection.candidates import explain_fallback, rank
    from ...selection.run_folder import load_run, save_selection

    found = load_run(run)
    ranked = rank(found.candidates, kl=kl, induce=induce, prune=prune)
    if as_json:
        echo_json(ranking(found, ranked))
    else:
        show_candidates(ranked, found.info, most)
    for finder in found.info.finders:
        progress.note(
            explain_fallback(ranked, finder)
            or f"{finder}: {sum(not c.failed for c in ranked if c.finder == finder)} pass"
        )
    if write:
        save_selection(ranked, found.trials, found.probes, run)
        click.echo(f"ranks written to {run / 'candidates.json'}", err=as_json)


@click.command(cls=Command)
@click.argument("model", type=MODEL)
@click.option("--out", type=NEW_FILE, help="File for the draft; default: print it.")
@revision_option
def describe(model: str, out: Path | None, revision: str | None) -> None:
    """Draft the description of an architecture that has none.

    Experiments on a small random model of MODEL's class find the modules that write and read the residual stream.
    Move the draft to orthogonalize/architectures once its open questions are answered.
    """
    from ..describe import describe as describe_model

    found = describe_model(model, revision)
    if out is None:
        click.echo(found.text, nl=False)
    else:
        out.write_text(found.text, "utf-8")
        click.echo(f"{out}: draft for {found.architecture.family}, {len(found.open_questions)} open questions")
