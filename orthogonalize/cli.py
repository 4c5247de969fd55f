"""The command line: each command is a thin layer over the function of the same name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .commands._console import (
    console,
    quieten_libraries,
    show_audit,
    show_candidates,
    show_comparison,
    show_judged,
    show_report,
    show_run,
    show_sweep,
    write_what_streams_can,
)
from .commands.options.common import (
    ListingOption,
    choice,
    converted_by,
    device_option,
    engine_option,
    engine_options,
    grid_options,
    hf_device_option,
    measuring_options,
    method_listing,
    named_sources,
    number,
    other_base_option,
    out_option,
    parallel_options,
    path,
    revision_option,
    scope_names,
    sweep_grid,
    words,
)
from .commands.options.edit import edit_options
from .commands.options.extract import extract_options
from .core import interrupts, progress
from .core.errors import OrthogonalizeError, ran_out_of_memory, shown
from .core.registry import load_plugins
from .core.words import counted

RESUME = "no partial output was left behind. Re-run the command to resume."


class Commands(click.Group):
    """The group of all commands, which turns errors into one line and an exit status.

    The status is 1 for errors that the user can fix, and 130 for Ctrl-C and SIGTERM.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with interrupts.handle_signals():
                return super().invoke(ctx)
        except OrthogonalizeError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except OSError as error:
            click.echo(f"error: {shown(error.filename or 'the system')}: {shown(error.strerror or error)}", err=True)
            ctx.exit(1)
        except (MemoryError, RuntimeError) as error:
            message = ran_out_of_memory(error)
            if message is None:
                raise
            advice = "free some memory, or choose another --device if the command has one"
            click.echo(f"error: {' '.join(message.split())}; {advice}; {RESUME}", err=True)
            ctx.exit(1)
        except (KeyboardInterrupt, click.Abort):
            click.echo(f"interrupted; {RESUME}", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        usual = ["extract", "edit", "eval", "push", "verify", "sweep"]
        return [*usual, "merge", "judge", "compare", "rank", "describe", "demo"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="orthogonalize")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars or notes.")
def main(quiet: bool) -> None:
    """Edit a concept out of, or into, a language model's weights, and prove it.

    The usual order is extract, edit, eval, push. MODEL is a checkpoint folder, a Hub id or a .gguf
    file. A prompt source is a .txt, .json, .jsonl, .csv or .parquet file, or a Hub dataset.
    """
    write_what_streams_can()
    progress.show(not quiet)
    load_plugins()
    quieten_libraries()


@main.command()
@click.argument("model")
@extract_options
def extract(model: str, out: Path, **options: Any) -> None:
    """Find where MODEL represents a contrast, and which edit removes it at the least cost.

    There are five stages: prompts, activations, directions, answers, selection. Those whose inputs are unchanged are
    kept, so re-running the command resumes an interrupted run.
    """
    from .commands.extract import extract as run_extract

    judge = options.pop("judge")
    if judge and options["measure"] != "auto":
        raise OrthogonalizeError("--judge NAME is short for --measure judge:NAME; give one of them")
    run = run_extract(model, out, **options | ({"measure": f"judge:{judge}"} if judge else {}))
    if run is None:
        click.echo(f"run: {out} (unfinished; run extract without --stage to finish it)")
        return
    show_candidates(run.candidates)
    show_run(run)
    click.echo(f"run: {out}")


@main.command("rank")
@click.argument("run", type=path(exists=True, file_okay=False))
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
def rank_(run: Path, kl: float, induce: float, prune: float, most: int, write: bool) -> None:
    """Filter and rank the directions of RUN again by their stored scores, without the model.

    The trials of whole edits are kept, so edit with --run alone still makes the best trial. With any other option, such
    as --method, it starts from the best direction by the stored ranks.
    """
    from .selection.candidates import explain_fallback, rank
    from .selection.run_folder import load_run, save_selection

    found = load_run(run)
    ranked = rank(found.candidates, kl=kl, induce=induce, prune=prune)
    show_candidates(ranked, most)
    for finder in found.info.finders:
        progress.note(
            explain_fallback(ranked, finder)
            or f"{finder}: {sum(not c.failed for c in ranked if c.finder == finder)} pass"
        )
    if write:
        save_selection(ranked, found.trials, found.probes, run)
        click.echo(f"ranks written to {run / 'candidates.json'}")


@main.command()
@click.argument("model")
@edit_options
def edit(model: str, out: Path | None, cache: str | None, **options: Any) -> None:
    """Write a copy of MODEL with a direction edited out of (or into) its weights.

    With --run alone, this makes the best edit that extract tried; with --pick N, number N of those that it lists. Both
    are taken whole. Any other option, --method included, makes a new edit: what you give, along the run's best
    direction for that method, and the defaults for the rest: --method ablate, --scope all (one for actadd), --strength
    1. What was taken from where is printed.
    """
    from .commands.edit import edit as run_edit

    recipe = run_edit(model, out, cache=cache, **options)
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


@main.command("eval")
@click.argument("checkpoint", type=path())
@click.option("--base", required=True, metavar="MODEL", help="The model that was edited.")
@click.option("--run", type=path(), required=True, help="The run whose test prompts are used.")
@out_option
@measuring_options
@click.option(
    "--prompts",
    multiple=True,
    metavar="[NAME=]FILE",
    callback=converted_by(named_sources),
    help="Your own prompts, measured beside the run's; repeatable.",
)
@click.option("--separate-engines", is_flag=True, help="Start vLLM for each model instead of swapping weights in one.")
@click.option("--redact", is_flag=True, help="Leave sensitive prompts and their answers out of the report.")
@other_base_option
@revision_option
def eval_(checkpoint: Path, base: str, run: Path, out: Path, **options: Any) -> None:
    """Measure base and edited side by side: behaviour, over-refusal, judges, and what the edit cost.

    The default suites need only the run's data; public sets are read from the Hub, or from --data. Re-run an
    interrupted evaluation to resume it.
    """
    from .commands.evaluate import evaluate

    engine = engine_options(options)
    report = evaluate(checkpoint, base, run, out, options=engine, **options)
    show_report(report)
    click.echo(f"report: {out / 'report.html'}")


@main.command()
@click.argument("adapter", type=path())
@click.option("--base", metavar="MODEL", help="The model that it adapts; default: the one that it names.")
@out_option
def merge(adapter: Path, base: str | None, out: Path, force: bool) -> None:
    """Merge a LoRA ADAPTER, of edit --format lora or any other, into its base.

    verify, eval and push take an adapter as well: they merge it into the cache of converted models.
    """
    from .commands.merge import merge as run_merge

    click.echo(f"checkpoint: {run_merge(adapter, out, base=base, force=force)}")


@main.command()
@click.argument("checkpoint", type=path())
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make the repository public; by default it is private.")
@click.option("--report", type=path(), metavar="DIR", help="Folder written by eval, for the card.")
def push(checkpoint: Path, repository: str, public: bool, report: Path | None) -> None:
    """Upload an edited CHECKPOINT with its card to the Hub."""
    from .commands.push import push as run_push

    click.echo(run_push(checkpoint, repository, public=public, report=report))


@main.command()
@click.argument("checkpoint", type=path())
@click.option("--base", metavar="MODEL", help="The model that was edited; default: the recipe's.")
@click.option("--no-logits", is_flag=True, help="Compare bytes only.")
@click.option("--no-record", is_flag=True, help="Do not write the result into the recipe.")
@other_base_option
@click.option("--json", "json_file", type=path(), metavar="FILE", help="Write the full result as JSON.")
@device_option
def verify(
    checkpoint: Path,
    base: str | None,
    no_logits: bool,
    no_record: bool,
    allow_other_base: bool,
    json_file: Path | None,
    device: str,
) -> None:
    """Audit how CHECKPOINT differs from its base; with a recipe, prove that hooks = weights.

    Any two checkpoints can be compared: what changed, by what rank, along which directions, and whether
    something was projected out.
    """
    from .commands.verify import verify as run_verify

    audit = run_verify(
        checkpoint,
        base,
        device=device,
        logits=not no_logits,
        record=not no_record,
        allow_other_base=allow_other_base,
    )
    show_audit(audit)
    if json_file is not None:
        json_file.write_text(audit.as_json(), "utf-8")
    if audit.verification is not None and not audit.verification.passed:
        sys.exit(1)


@main.command()
@click.argument("model")
@click.option("--out", type=path(dir_okay=False), help="File for the draft; default: print it.")
@revision_option
def describe(model: str, out: Path | None, revision: str | None) -> None:
    """Draft the description of an architecture that has none.

    Experiments on a small random model of MODEL's class find the modules that write and read the residual stream.
    Move the draft to orthogonalize/architectures once its open questions are answered.
    """
    from .commands.describe import describe as describe_model

    found = describe_model(model, revision)
    if out is None:
        click.echo(found.text, nl=False)
    else:
        out.write_text(found.text, "utf-8")
        console.print(f"{out}: draft for {found.architecture.family}, {len(found.open_questions)} open questions")


@main.command()
@click.argument("model")
@click.option("--run", type=path(), required=True, help="The run whose directions and test prompts are used.")
@out_option
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
@revision_option
def sweep(model: str, run: Path, out: Path, **options: Any) -> None:
    """Measure every method over every scope, in one engine: the comparison table.

    The engine starts once and swaps in each edit's weights, if it can; otherwise each edit gets its own engine. Re-run
    an interrupted sweep to resume it.
    """
    from .commands.sweep import sweep as run_sweep

    grid, engine = sweep_grid(options), engine_options(options)
    show_sweep(run_sweep(model, run, out, grid=grid, options=engine, **options))
    click.echo(f"sweep: {out / 'sweep.json'}, {out / 'pareto.png'}")


@main.command()
@click.argument("file", type=path())
@click.option(
    "--judge", "name", default="prefix", show_default=True, help="prefix (by wording), wildguard, … or NAME=MODEL."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@engine_option
@parallel_options
@hf_device_option
def judge(file: Path, name: str, as_json: bool, engine: Any, **options: Any) -> None:
    """Score answers made earlier: FILE is a report of eval, or a JSON list of {prompt, response, category}.

    The answers of a report are scored for both models, by prompt set, without generating them again.
    """
    from .commands.judge import judge as run_judge

    found = run_judge(file, name, engine=engine, options=engine_options(options))
    if as_json:
        click.echo(found.model_dump_json(indent=1, exclude_none=True))
    else:
        show_judged(found)


@main.command()
@click.argument("first", type=path())
@click.argument("second", type=path())
def compare(first: Path, second: Path) -> None:
    """Set two reports of eval side by side: FIRST and SECOND are folders made by eval, or their report.json.

    Refusals are compared prompt by prompt, other measures by their values.
    """
    from .commands.compare import compare as run_compare

    show_comparison(run_compare(first, second))


@main.command()
@click.option("--out", type=path(), default=Path("demo"), show_default=True, help="Folder for all output.")
@click.option(
    "--goal", type=click.Choice(["remove", "calibrate"]), default="remove", show_default=True,
    help="calibrate plants a refusal of astronomy as well, and keeps it.",
)  # fmt: skip
@engine_option
@click.option("--force", is_flag=True, help="Replace an earlier demo in OUT.")
def demo(out: Path, goal: str, engine: Any, force: bool) -> None:
    """Run the full pipeline on the embedded 135M model: plant a refusal of cooking, find it, remove it, measure."""
    from .commands.demo import demo as run_demo

    result = run_demo(out, goal=goal, engine=engine, force=force)
    click.echo(f"edit: {result.recipe.choice.describe()}")
    click.echo(f"hooks = weights: largest logit difference {result.verification.hooks_gap:.1e}")
    show_report(result.report)
    click.echo(f"model card: {out / 'edited' / 'README.md'}")
    click.echo(f"report: {result.page}")


if __name__ == "__main__":
    main()
