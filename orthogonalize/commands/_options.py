"""What the commands ask for: groups of options, and the types and lists that their values are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..checkpoints.rounding.registry import DEFAULT_ROUNDING, ROUNDING_SCHEMES
from ..core.errors import OrthogonalizeError
from ..core.registry import Registry
from ..data.refusals import LEAST_TOKENS
from ..directions.finders.registry import FINDERS
from ..edits.methods.registry import METHODS


class Rank(click.ParamType[int | str]):
    """A number from 1 on, acc99 or acc95."""

    name = "K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value in ("acc99", "acc95"):
            return str(value)
        if str(value).isdecimal() and int(value) > 0:
            return int(value)
        return self.fail(f"{value!r} is neither a number from 1 on nor acc99 or acc95", param, ctx)


class NameIn(click.ParamType[str]):
    """The name of an entry of a registry, which is read at parse time, when plugins have added theirs."""

    name = "choice"

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(self.registry)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(click.Choice(list(self.registry)).convert(value, param, ctx))


def path(**options: Any) -> click.Path:
    return click.Path(path_type=Path, **options)


class Entry(click.ParamType[str]):
    """The name of one of a registry's entries. The registry is read late, so plugins may have added to it."""

    name = "name"

    def __init__(self, names: Callable[[], Sequence[str]]) -> None:
        self.names = names

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(self.names())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.names():
            self.fail(f"{value!r} is not one of {', '.join(map(repr, self.names()))}.", param, ctx)
        return str(value)


class ListingOption(click.Option):
    """An option whose help ends with `listing()`, which is read only when help is shown."""

    def __init__(self, *arguments: Any, listing: Callable[[], str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.listing = listing

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        said, self.help = self.help, f"{self.help} {self.listing()}"
        try:
            return super().get_help_record(ctx)
        finally:
            self.help = said


def suite_listing() -> str:
    """Every value of --suite."""
    from ..evals.suites.registry import suite_names

    return f"One or more of {', '.join(suite_names())}."


def judge_listing() -> str:
    """Every value of --judge."""
    from ..evals.judges.registry import model_judges

    return f"One or more of {', '.join(model_judges())}, or NAME=MODEL."


def engine_names() -> list[str]:
    """The names of all engines."""
    from ..engines.registry import ENGINES

    return list(ENGINES)


def hooked_engine_names() -> list[str]:
    """The names of the engines whose activations can be read."""
    from ..engines.registry import ENGINES

    return [entry.name for entry in ENGINES.values() if entry.hooks]


def together(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def number(name: str, least: int, default: int | None = None, help: str | None = None) -> Callable[..., Any]:
    """An option for a whole number from `least` on."""
    kind = click.IntRange(min=least)
    return click.option(name, type=kind, default=default, show_default=default is not None, help=help)


def choice(name: str, of: Sequence[str], default: str | None = None, help: str | None = None) -> Callable[..., Any]:
    """An option for one of several words."""
    return click.option(name, type=click.Choice(of), default=default, show_default=default is not None, help=help)


engine_option = click.option("--engine", type=Entry(engine_names), default="vllm", show_default=True)
out_option = together(
    click.option("--out", type=path(), required=True, help="Folder to make; it appears only when complete."),
    click.option("--force", is_flag=True, help="Replace OUT if this tool made it."),
)
revision_option = click.option("--revision", help="Branch, tag or commit of a Hub model.")
hf_device_option = click.option(
    "--device", default="auto", show_default=True, help="Of --engine hf: auto, cpu, cuda, cuda:1, …"
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
parallel_options = together(
    number("--tensor-parallel-size", 1, 1, "GPUs that share every layer."),
    number("--pipeline-parallel-size", 1, 1, "GPUs that share the layers."),
    number("--data-parallel-size", 1, 1, "Engines, a process each."),
    choice("--distributed-executor-backend", ["mp", "ray"], None, "vLLM's; ray: many machines."),
    click.option(
        "--gpu-memory-utilization", type=click.FloatRange(0.05, 1), default=0.85, show_default=True,
        help="Share of each GPU's memory that vLLM takes.",
    ),
)  # fmt: skip
measuring_options = together(
    click.option(
        "--suite",
        cls=ListingOption,
        listing=suite_listing,
        default="refusal,behaviour,loss,kl",
        show_default=True,
        help="What to measure.",
    ),
    click.option("--data", type=path(), metavar="DIR", help="Local copies of public sets: DIR/OWNER/NAME/SPLIT.jsonl."),
    click.option(
        "--judge",
        cls=ListingOption,
        listing=judge_listing,
        default="none",
        show_default=True,
        help="Judge models for the answers.",
    ),
    engine_option,
    number("--max-new-tokens", 1, LEAST_TOKENS),
    number("--limit", 1, None, "Most items of any set."),
    parallel_options,
    hf_device_option,
)
extract_options = together(
    click.option("--out", type=path(), required=True, help="Run folder to make, or to go on with."),
    click.option(
        "--force", is_flag=True, help="Do stages over that were done with other inputs (or all, if none was)."
    ),
    click.option("--concept", help="A named contrast: cooking (the demo's), lists or refusal."),
    click.option("--positive", metavar="P", help="Prompts that show the concept."),
    click.option("--negative", metavar="P", help="Prompts that do not."),
    click.option("--column", help="Column or key of the prompts' text."),
    click.option("--split", "hub_split", default="train", show_default=True, help="Split of a Hub dataset."),
    click.option(
        "--finders",
        "--methods",
        "finders",
        default=",".join(FINDERS),
        show_default=True,
        help="What finds directions: " + "; ".join(f"{f.name} ({f.summary})" for f in FINDERS.values()) + ".",
    ),
    click.option(
        "--engine", type=Entry(hooked_engine_names), default="hf", show_default=True, help="What reads activations."
    ),
    number("--train", 6, 128, "Prompts a side to find directions with."),
    number("--val", 1, 32, "Prompts a side to select with."),
    number("--test", 0, 100, "Prompts a side kept for eval."),
    number("--trials", 0, 32, "Whole edits to try; 0 skips the search."),
    click.option("--behaviour-tokens", metavar="T,T", help="First tokens of the behaviour; learnt by default."),
    click.option("--no-filter", is_flag=True, help="Keep prompts on which the model does not behave as expected."),
    click.option("--system", help="System prompt."),
    click.option("--template-argument", multiple=True, metavar="NAME=VALUE", help="Passed to the chat template."),
    click.option("--no-chat-template", is_flag=True, help="Send the bare prompts."),
    click.option("--sensitive", is_flag=True, help="Your own prompts are: eval folds them, and can --redact them."),
    number("--max-rank", 1, None, "Most INLP directions; default 20."),
    choice("--solver", ["newton", "sklearn"], "newton", "For INLP."),
    choice("--classifier", ["logistic", "svm"], "logistic", "For INLP; svm needs --solver sklearn."),
    click.option(
        "--scoring", default="local", show_default=True, help="local, or local,global (edits everywhere too)."
    ),
    choice("--stage", ["prompts", "activations", "directions", "selection"], None, "Run this one alone."),
    choice("--dtype", ["float32", "bfloat16", "float16"], None, "By default chosen by device."),
    click.option("--seed", default=0, show_default=True),
    number("--seeds", 1, 1, "Draws of the prompts, to show how stable the directions are."),
    click.option("--trust-remote-code", is_flag=True, help="Run code from the model's repository."),
    revision_option,
    device_option,
)
edit_options = together(
    click.option("--out", type=path(), help="Folder to make; it appears only when complete."),
    click.option(
        "--cache", metavar="OWNER/NAME", help="Or write into the Hub's cache, to be loaded by this name offline."
    ),
    click.option("--force", is_flag=True, help="Replace OUT, or OWNER/NAME, if this tool made it."),
    click.option("--run", type=path(), help="A run folder made by extract."),
    click.option("--direction", type=path(), metavar="FILE", help="safetensors, or refusal_direction's direction.pt."),
    click.option("--recipe", type=path(), metavar="FILE", help="An orthogonalize.json: rebuild that edit."),
    click.option("--method", type=NameIn(METHODS), help="How to edit; by default as the run's best trial."),
    click.option("--scope", help="all, one, top:50%, layers:3,5-9, upto:12 or from:12."),
    click.option("--strength", type=float, help="Scales the edit; 1 removes all of the direction."),
    click.option(
        "--per-layer/--shared", default=None, help="Each site along its own layer's direction, or all along one."
    ),
    click.option("--position", type=int, help="Token position of the direction, from the end: -1, -2, …"),
    click.option("--layer", type=int, help="Layer of the direction."),
    click.option("--rank", type=Rank(), help="First K directions of an INLP basis; acc99, acc95: by their accuracy."),
    click.option("--orthogonal", is_flag=True, default=None, help="For leace: its orthogonal form."),
    click.option("--alpha", type=float, help="For reflect: 1 projects, 2 mirrors (default)."),
    click.option("--coefficient", type=float, help="For actadd: length added; default the mean difference's."),
    click.option(
        "--rounding",
        type=NameIn(ROUNDING_SCHEMES),
        help=f"Default: {DEFAULT_ROUNDING} ({ROUNDING_SCHEMES[DEFAULT_ROUNDING].summary}).",
    ),
    number("--workers", 1, 1, "Files written at a time."),
    choice("--format", ["checkpoint", "lora"], "checkpoint", "lora: a PEFT adapter, where only linear layers change."),
    click.option("--shard", metavar="I/N", help="Write share I of N of the files; OUT appears with the last share."),
    click.option("--link", is_flag=True, help="Hard links instead of copies of files in which nothing changes."),
    revision_option,
)


def engine_options(options: dict[str, Any]) -> Any:
    """The engine's options, taken out of a command's."""
    from ..engines.base import EngineOptions

    names = (
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend",
        "gpu_memory_utilization",
    )  # fmt: skip
    return EngineOptions(device=options.pop("device"), **{name: options.pop(name) for name in names})


def judge_names(text: str) -> list[str]:
    return [name for name in words(text) if name != "none"]


def words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def template_arguments(pairs: Sequence[str]) -> dict[str, Any]:
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


def tokens(text: str | None) -> list[int | str] | None:
    """Behaviour tokens: numbers are ids, all else is text; commas separate."""
    return [int(w) if w.isdecimal() else w for w in words(text)] or None


def scope_names(text: str) -> list[str]:
    """Scopes apart; a comma followed by a number belongs to its layers."""
    return [part.strip() for part in re.split(r",(?!\s*\d)", text) if part.strip()]
