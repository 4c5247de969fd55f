"""The command line: each command a thin layer over the function of the same name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from . import progress
from .display import console, show_audit, show_candidates, show_report, show_run
from .errors import OrthogonalizeError


class Commands(click.Group):
    """Turns what a user can mend into one line and exit status 1, and Ctrl-C into 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OrthogonalizeError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(1)
        except OSError as error:
            click.echo(f"error: {error.filename or 'the system'}: {error.strerror or error}", err=True)
            ctx.exit(1)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted: nothing half-finished was left; the same extract goes on where it was", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["extract", "edit", "eval", "push", "verify", "sweep", "judge", "rank", "describe", "demo"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="orthogonalize")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars or notes.")
def main(quiet: bool) -> None:
    """Edit a concept out of, or into, a language model's weights, and prove it.

    The usual road is extract, edit, eval, push. MODEL is a checkpoint folder, a Hub id or a .gguf
    file. A prompt source is a .txt, .json, .jsonl, .csv or .parquet file, or a Hub dataset.
    """
    progress.show(not quiet)
    _quieten_libraries()


def _quieten_libraries() -> None:
    """Our bars say what happens; the libraries' own would tear them."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class Rank(click.ParamType[int | str]):
    """A number from 1 on, acc99 or acc95."""

    name = "K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value in ("acc99", "acc95"):
            return str(value)
        if str(value).isdecimal() and int(value) > 0:
            return int(value)
        return self.fail(f"{value!r} is neither a number from 1 on nor acc99 or acc95", param, ctx)


def _path(**options: Any) -> click.Path:
    return click.Path(path_type=Path, **options)


def _together(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


out_option = _together(
    click.option("--out", type=_path(), required=True, help="Folder to make; it appears only when complete."),
    click.option("--force", is_flag=True, help="Replace OUT if this tool made it."),
)
revision_option = click.option("--revision", help="Branch, tag or commit of a Hub model.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")


parallel_options = _together(
    click.option("--tensor-parallel-size", type=click.IntRange(min=1), default=1, help="GPUs that share every layer."),
    click.option("--pipeline-parallel-size", type=click.IntRange(min=1), default=1, help="GPUs that share the layers."),
    click.option("--data-parallel-size", type=click.IntRange(min=1), default=1, help="Engines, a process each."),
    click.option(
        "--distributed-executor-backend", type=click.Choice(["mp", "ray"]), help="vLLM's; ray: many machines."
    ),
)
measuring_options = _together(
    click.option("--suite", default="refusal,behaviour,loss,kl", show_default=True, help="What to measure."),
    click.option(
        "--data", type=_path(), metavar="DIR", help="Local copies of public sets: DIR/OWNER/NAME/SPLIT.jsonl."
    ),
    click.option("--judge", default="none", show_default=True, help="llama-guard-3, wildguard, …, or NAME=MODEL."),
    click.option("--engine", type=click.Choice(["vllm", "hf"]), default="vllm", show_default=True),
    click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True),
    click.option("--limit", type=click.IntRange(min=1), help="Most items of any set."),
    parallel_options,
    device_option,
)


def _engine_options(options: dict[str, Any]) -> Any:
    """The engine's options, taken out of a command's."""
    from .engines import EngineOptions

    names = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend")
    return EngineOptions(device=options.pop("device"), **{name: options.pop(name) for name in names})


def _judges(text: str) -> list[str]:
    return [name for name in _words(text) if name != "none"]


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _template_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise OrthogonalizeError(f"--template-argument {pair!r} is not of the form name=value")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments


def _tokens(text: str | None) -> list[int | str] | None:
    """Behaviour tokens: numbers are ids, all else is text; commas separate."""
    return [int(w) if w.isdecimal() else w for w in _words(text)] or None


@main.command()
@click.argument("model")
@click.option("--out", type=_path(), required=True, help="Run folder to make, or to go on with.")
@click.option("--force", is_flag=True, help="Do stages over that were done with other inputs (or all, if none was).")
@click.option("--concept", help="A named contrast: cooking (the demo's), lists or refusal.")
@click.option("--positive", metavar="P", help="Prompts that show the concept.")
@click.option("--negative", metavar="P", help="Prompts that do not.")
@click.option("--column", help="Column or key of the prompts' text.")
@click.option("--split", "hub_split", default="train", show_default=True, help="Split of a Hub dataset.")
@click.option("--methods", default="dim,inlp,leace", show_default=True, help="dim (diff-in-means), inlp, leace.")
@click.option("--engine", type=click.Choice(["hf"]), default="hf", show_default=True, help="What reads activations.")
@click.option(
    "--train",
    type=click.IntRange(min=6),
    default=128,
    show_default=True,
    help="Prompts a side to find directions with.",
)
@click.option("--val", type=click.IntRange(min=1), default=32, show_default=True, help="Prompts a side to select with.")
@click.option(
    "--test", type=click.IntRange(min=0), default=100, show_default=True, help="Prompts a side kept for eval."
)
@click.option(
    "--trials",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Whole edits to try; 0 skips the search.",
)
@click.option("--behaviour-tokens", metavar="T,T", help="First tokens of the behaviour; learnt by default.")
@click.option("--no-filter", is_flag=True, help="Keep prompts on which the model does not behave as expected.")
@click.option("--system", help="System prompt.")
@click.option("--template-argument", multiple=True, metavar="NAME=VALUE", help="Passed to the chat template.")
@click.option("--no-chat-template", is_flag=True, help="Send the bare prompts.")
@click.option("--max-rank", type=click.IntRange(min=1), help="Most INLP directions; default 20.")
@click.option(
    "--solver", type=click.Choice(["newton", "sklearn"]), default="newton", show_default=True, help="For INLP."
)
@click.option(
    "--classifier",
    type=click.Choice(["logistic", "svm"]),
    default="logistic",
    show_default=True,
    help="For INLP; svm needs --solver sklearn.",
)
@click.option("--scoring", default="local", show_default=True, help="local, or local,global (edits everywhere too).")
@click.option(
    "--stage", type=click.Choice(["prompts", "activations", "directions", "selection"]), help="Run this one alone."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="By default chosen by device.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Draws of the prompts, to show how stable the directions are.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code from the model's repository.")
@revision_option
@device_option
def extract(
    model: str,
    out: Path,
    force: bool,
    concept: str | None,
    positive: str | None,
    negative: str | None,
    column: str | None,
    hub_split: str,
    methods: str,
    engine: str,
    scoring: str,
    stage: Any,
    behaviour_tokens: str | None,
    no_filter: bool,
    template_argument: tuple[str, ...],
    no_chat_template: bool,
    dtype: str | None,
    revision: str | None,
    **others: Any,
) -> None:
    """Find where MODEL represents a contrast, and which edit removes it at the least cost.

    Four stages: prompts, activations, directions, selection. Called again on the same OUT, those whose
    inputs are unchanged are kept, and one that was interrupted goes on where it was.
    """
    import torch

    from .extraction import Settings
    from .extraction import extract as run_extract

    settings = Settings(
        methods=tuple(_words(methods)),
        scoring=tuple(_words(scoring)),
        behaviour_tokens=_tokens(behaviour_tokens),
        filtered=not no_filter,
        template_arguments=_template_arguments(template_argument),
        chat_template=not no_chat_template,
        dtype=getattr(torch, dtype) if dtype else None,
        **others,
    )
    run = run_extract(
        model,
        out,
        concept=concept,
        positive=positive,
        negative=negative,
        column=column,
        hub_split=hub_split,
        revision=revision,
        settings=settings,
        stage=stage,
        force=force,
    )
    if run is not None:
        show_candidates(run.candidates)
        show_run(run)
    click.echo(f"run: {out}" if run is not None else f"run: {out} (not finished: extract without --stage goes on)")


@main.command("rank")
@click.argument("run", type=_path(exists=True, file_okay=False))
@click.option("--kl", type=float, default=0.1, show_default=True, help="Most KL on the other side, nats.")
@click.option("--induce", type=float, default=0.0, show_default=True, help="Least score when added, log-odds.")
@click.option(
    "--prune", type=click.FloatRange(0, 1), default=0.2, show_default=True, help="Share of last layers left out."
)
@click.option("--most", type=click.IntRange(min=1), default=10, show_default=True, help="Candidates shown a method.")
@click.option("--write", is_flag=True, help="Store the new ranks in RUN, for edit to use.")
def rank_(run: Path, kl: float, induce: float, prune: float, most: int, write: bool) -> None:
    """Filter and rank the directions of RUN again by their stored scores; no model is needed."""
    from .run import load_run, save_selection
    from .selection import explain_fallback, rank

    found = load_run(run)
    ranked = rank(found.candidates, kl=kl, induce=induce, prune=prune)
    show_candidates(ranked, most)
    for method in found.info.methods:
        progress.note(
            explain_fallback(ranked, method)
            or f"{method}: {sum(not c.failed for c in ranked if c.method == method)} pass"
        )
    if write:
        save_selection(ranked, found.trials, found.probes, run)
        click.echo(f"ranks written to {run / 'candidates.json'}")


@main.command()
@click.argument("model")
@click.option("--out", type=_path(), help="Folder to make; it appears only when complete.")
@click.option("--cache", metavar="OWNER/NAME", help="Or write into the Hub's cache, to be loaded by this name offline.")
@click.option("--force", is_flag=True, help="Replace OUT, or OWNER/NAME, if this tool made it.")
@click.option("--run", type=_path(), help="A run folder made by extract.")
@click.option("--direction", type=_path(), metavar="FILE", help="safetensors, or refusal_direction's direction.pt.")
@click.option("--recipe", type=_path(), metavar="FILE", help="An orthogonalize.json: rebuild that edit.")
@click.option(
    "--method", type=click.Choice(["ablate", "nullspace", "reflect", "actadd", "leace"]), help="Default: the run's."
)
@click.option("--scope", help="all, one, top:50%, layers:3,5-9, upto:12 or from:12.")
@click.option("--strength", type=float, help="Scales the edit; 1 removes all of the direction.")
@click.option("--per-layer/--shared", default=None, help="Each site along its own layer's direction, or all along one.")
@click.option("--position", type=int, help="Token position of the direction, from the end: -1, -2, …")
@click.option("--layer", type=int, help="Layer of the direction.")
@click.option("--rank", type=Rank(), help="First K directions of an INLP basis; acc99, acc95: by their accuracy.")
@click.option("--orthogonal", is_flag=True, default=None, help="For leace: its orthogonal form.")
@click.option("--alpha", type=float, help="For reflect: 1 projects, 2 mirrors (default).")
@click.option("--coefficient", type=float, help="For actadd: length added; default the mean difference's.")
@click.option(
    "--rounding", type=click.Choice(["cancelling", "nearest"]), help="Default: cancelling, which keeps the edit."
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Files written at a time.")
@click.option(
    "--format",
    type=click.Choice(["checkpoint", "lora"]),
    default="checkpoint",
    show_default=True,
    help="lora: a PEFT adapter, where only linear layers change.",
)
@click.option("--shard", metavar="I/N", help="Write share I of N of the files; OUT appears with the last share.")
@click.option("--link", is_flag=True, help="Hard links instead of copies of files in which nothing changes.")
@revision_option
def edit(model: str, out: Path | None, cache: str | None, **options: Any) -> None:
    """Write a copy of MODEL with a direction edited out of (or into) its weights.

    With --run and nothing else, the best edit that extract tried is made. Naming any setting starts
    from the best single direction instead, over --scope all (one for actadd) at strength 1.
    """
    from .editing import edit as run_edit

    recipe = run_edit(model, out, cache=cache, **options)
    where = f"{cache} in the Hub's cache" if out is None else str(out)
    if options["format"] == "lora":
        click.echo(f"{recipe.choice.describe()}; adapter: {where}")
        return
    if out is not None and not out.exists():
        click.echo(f"{recipe.choice.describe()}: share {options['shard']} is written; {out} appears with the last")
        return
    click.echo(
        f"{recipe.choice.describe()}: {len(recipe.tensors)} tensors edited, {len(recipe.added)} added; "
        f"checkpoint: {where}"
    )


@main.command("eval")
@click.argument("checkpoint", type=_path())
@click.option("--base", required=True, metavar="MODEL", help="The model that was edited.")
@click.option("--run", type=_path(), required=True, help="The run whose test prompts are used.")
@out_option
@measuring_options
@click.option("--separate-engines", is_flag=True, help="Start vLLM for each model instead of swapping weights in one.")
@click.option("--redact", is_flag=True, help="Leave sensitive prompts and their answers out of the report.")
@revision_option
def eval_(checkpoint: Path, base: str, run: Path, out: Path, suite: str, judge: str, **options: Any) -> None:
    """Measure base and edited side by side: behaviour, over-refusal, judges, and what the edit cost.

    Suites: refusal, behaviour (its first token), loss and kl need no data of their own. pile, alpaca, mmlu,
    arc, truthfulqa, xstest, orbench and further prompt sets are read from the Hub, or from --data. Any task of
    lm-eval is lm_eval:TASK. A command that was cut off goes on where it stopped.
    """
    from .evaluation import evaluate

    engine = _engine_options(options)
    report = evaluate(
        checkpoint, base, run, out, suites=_words(suite), judges=_judges(judge), options=engine, **options
    )
    show_report(report)
    click.echo(f"report: {out / 'report.html'}")


@main.command()
@click.argument("checkpoint", type=_path())
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make the repository public; by default it is private.")
@click.option("--report", type=_path(), metavar="DIR", help="A folder made by eval, for the card.")
def push(checkpoint: Path, repository: str, public: bool, report: Path | None) -> None:
    """Upload an edited CHECKPOINT with its card to the Hub."""
    from .hub import push as run_push

    click.echo(run_push(checkpoint, repository, public=public, report=report))


@main.command()
@click.argument("checkpoint", type=_path())
@click.option("--base", metavar="MODEL", help="The model that was edited; by default the recipe's.")
@click.option("--no-logits", is_flag=True, help="Compare bytes only.")
@click.option("--no-record", is_flag=True, help="Do not write the result into the recipe.")
@click.option("--json", "json_file", type=_path(), metavar="FILE", help="Write everything found as JSON.")
@device_option
def verify(
    checkpoint: Path, base: str | None, no_logits: bool, no_record: bool, json_file: Path | None, device: str
) -> None:
    """Audit how CHECKPOINT differs from its base; with a recipe, prove that hooks = weights.

    Any two checkpoints can be compared: what changed, by what rank, along which directions, and whether
    something was projected out.
    """
    from .verification import verify as run_verify

    audit = run_verify(checkpoint, base, device=device, logits=not no_logits, record=not no_record)
    show_audit(audit)
    if json_file is not None:
        json_file.write_text(audit.as_json(), "utf-8")
    if audit.verification is not None and not audit.verification.passed:
        sys.exit(1)


@main.command()
@click.argument("model")
@click.option("--out", type=_path(dir_okay=False), help="File for the draft; printed without it.")
@revision_option
def describe(model: str, out: Path | None, revision: str | None) -> None:
    """Draft the description of an architecture that has none.

    Experiments on a small random model of MODEL's class find what writes and reads the residual stream.
    The draft goes into orthogonalize/architectures once its open questions are answered.
    """
    from .describing import describe as describe_model

    found = describe_model(model, revision)
    if out is None:
        click.echo(found.text, nl=False)
    else:
        out.write_text(found.text, "utf-8")
        console.print(f"{out}: a draft for {found.architecture.family}, {len(found.open_questions)} open questions")


@main.command()
@click.argument("model")
@click.option("--run", type=_path(), required=True, help="The run whose directions and test prompts are used.")
@out_option
@click.option("--methods", default="", help="ablate,nullspace,… (default: all that the run has directions for).")
@click.option("--scopes", default="one,top:50%,all", show_default=True)
@click.option(
    "--semantics",
    type=click.Choice(["weights", "residual"]),
    default="weights",
    show_default=True,
    help="residual: the reference's own hooks, with --engine hf.",
)
@measuring_options
@revision_option
def sweep(model: str, run: Path, out: Path, methods: str, scopes: str, suite: str, judge: str, **options: Any) -> None:
    """Measure every method over every scope, in one engine: the comparison table.

    The engine starts once; each edit's weights are swapped in place. A sweep that was cut off goes on where it
    stopped.
    """
    from .sweeps import sweep as run_sweep
    from .sweeps import sweep_columns, sweep_rows

    found = run_sweep(
        model,
        run,
        out,
        suites=_words(suite),
        methods=_words(methods),
        scopes=_scopes(scopes),
        judges=_judges(judge),
        options=_engine_options(options),
        **options,
    )
    table = Table(title=f"{found.model} ({found.engine_version})")
    for i, name in enumerate(sweep_columns(found)):
        table.add_column(name, no_wrap=i == 0)
    for row in sweep_rows(found):
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)
    click.echo(f"sweep: {out / 'sweep.json'}, {out / 'pareto.png'}")


def _scopes(text: str) -> list[str]:
    """Scopes apart; a comma followed by a number belongs to its layers."""
    return [part.strip() for part in re.split(r",(?!\s*\d)", text) if part.strip()]


@main.command()
@click.argument("file", type=_path())
@click.option(
    "--judge", "name", default="prefix", show_default=True, help="prefix (by wording), wildguard, …, NAME=MODEL."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--engine", type=click.Choice(["vllm", "hf"]), default="vllm", show_default=True)
@parallel_options
@device_option
def judge(file: Path, name: str, as_json: bool, engine: Any, **options: Any) -> None:
    """Score answers made elsewhere: FILE is a JSON list of {prompt, response, category}."""
    from .judging import judge as run_judge

    found = run_judge(file, name, engine=engine, options=_engine_options(options))
    if as_json:
        click.echo(found.model_dump_json(indent=1, exclude_none=True))
        return
    from .tables import value

    table = Table(title=f"{found.n} answers, judged by {found.model or found.judge}")
    for column in ("", "share", "n", "unreadable"):
        table.add_column(column)
    for field, rate in (("refusal", found.refusal), ("harmful", found.harmful)):
        if rate is None:
            continue
        for label, part in [(field, rate), *((f"  {c}", r) for c, r in rate.by_category.items())]:
            table.add_row(label, value(part).replace("[", r"\["), str(part.n), str(part.unparseable))
    console.print(table)


@main.command()
@click.option("--out", type=_path(), default=Path("demo"), show_default=True, help="Folder for all that it makes.")
@click.option("--engine", type=click.Choice(["vllm", "hf"]), default="vllm", show_default=True)
@click.option("--force", is_flag=True, help="Replace an earlier demo in OUT.")
def demo(out: Path, engine: Any, force: bool) -> None:
    """All of it on the embedded 135M model: plant a refusal of cooking, find it, remove it, measure."""
    from .demonstration import demo as run_demo

    result = run_demo(out, engine=engine, force=force)
    click.echo(f"edit: {result.recipe.choice.describe()}")
    click.echo(f"hooks = weights: largest difference of a logit {result.verification.hooks_gap:.1e}")
    show_report(result.report)
    click.echo(f"model card: {out / 'edited' / 'README.md'}")
    click.echo(f"report: {result.page}")


if __name__ == "__main__":
    main()
