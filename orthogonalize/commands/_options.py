"""Groups of click options, their types and the conversion of their values."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..core.errors import OrthogonalizeError
from ..data.prompts import GOALS
from ..data.refusals import LEAST_TOKENS
from ..directions.finders.registry import DEFAULT_FINDERS, FINDERS
from ..edits.methods.registry import METHODS


class Rank(click.ParamType[int | str]):
    """A positive number, acc99 or acc95."""

    name = "K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value in ("acc99", "acc95"):
            return str(value)
        if str(value).isdecimal() and int(value) > 0:
            return int(value)
        return self.fail(f"{value!r} is neither a positive number nor acc99 or acc95", param, ctx)


def path(**options: Any) -> click.Path:
    """A type for paths, as `pathlib.Path`."""
    return click.Path(path_type=Path, **options)


class Entry(click.ParamType[str]):
    """The name of a registry entry. The registry is read on use, so that it includes the entries of plugins."""

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
    """An option whose help ends with `listing()`, which is called only when the help is shown."""

    def __init__(self, *arguments: Any, listing: Callable[[], str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.listing = listing

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        plain, self.help = self.help, f"{self.help} {self.listing()}"
        try:
            return super().get_help_record(ctx)
        finally:
            self.help = plain


def finder_listing() -> str:
    """Every value of --finders, and what it finds."""
    return "; ".join(f"{finder.name} ({finder.summary})" for finder in FINDERS.values()) + "."


def finders_by_method() -> str:
    """The finders of each method that takes the directions of several."""
    several = (method for method in METHODS.values() if len(method.finders) > 1)
    return "; ".join(f"{method.name}: {', '.join(method.finders)}" for method in several) + "."


def method_listing() -> str:
    """Every value of --methods of `sweep`."""
    return f"One or more of {', '.join(METHODS)}."


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


def words(text: str | None) -> list[str]:
    """The words of a comma-separated list."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def judge_names(text: str) -> list[str]:
    """The judges in a comma-separated list, in which `none` stands for no judge."""
    return [name for name in words(text) if name != "none"]


def scope_names(text: str) -> list[str]:
    """The scopes in a comma-separated list; a comma before a number belongs to a scope's layers."""
    return [part.strip() for part in re.split(r",(?!\s*\d)", text) if part.strip()]


def tokens(text: str | None) -> list[int | str] | None:
    """Behaviour tokens in a comma-separated list: numbers are token ids, anything else is text."""
    return [int(w) if w.isdecimal() else w for w in words(text)] or None


def template_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Arguments of the chat template from `NAME=VALUE` pairs; a value is JSON, or else text."""
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


def named_sources(given: Sequence[str]) -> dict[str, str]:
    """Prompt sources by name, from `NAME=FILE`, or from `FILE` alone, which is called after itself."""
    from ..data.prompts import source_names

    sources: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals:
            name, source = source_names([text])[text], text
        if not name or not source or "." in name:
            raise OrthogonalizeError(f"--prompts {text!r} is not of the form NAME=FILE, with a name without dots")
        if name in sources:
            raise OrthogonalizeError(f"--prompts: the name {name!r} is given twice; use NAME=FILE")
        sources[name] = source
    return sources


def torch_dtype(name: str | None) -> Any:
    """The torch dtype called `name`; None stays None."""
    import torch

    return getattr(torch, name) if name else None


def converted_by(convert: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A click callback that replaces an option's value by `convert(value)`."""
    return lambda _context, _parameter, value: convert(value)


def together(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One decorator that adds several options."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def number(name: str, least: int, default: int | None = None, help: str | None = None) -> Callable[..., Any]:
    """An option for a whole number, at least `least`."""
    kind = click.IntRange(min=least)
    return click.option(name, type=kind, default=default, show_default=default is not None, help=help)


def choice(name: str, of: Sequence[str], default: str | None = None, help: str | None = None) -> Callable[..., Any]:
    """An option for one of several words."""
    return click.option(name, type=click.Choice(of), default=default, show_default=default is not None, help=help)


engine_option = click.option(
    "--engine", type=Entry(engine_names), default="vllm", show_default=True, help="Inference engine."
)
out_option = together(
    click.option("--out", type=path(), required=True, help="Folder to create; it appears only when complete."),
    click.option("--force", is_flag=True, help="Replace OUT if this tool made it."),
)
other_base_option = click.option(
    "--allow-other-base", is_flag=True, help="Go ahead, and say so, if the weights are not those of the recipe or run."
)
revision_option = click.option("--revision", help="Branch, tag or commit of a Hub model.")
hf_device_option = click.option(
    "--device", default="auto", show_default=True, help="Device for --engine hf: auto, cpu, cuda, cuda:1, …"
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
parallel_options = together(
    number("--tensor-parallel-size", 1, 1, "GPUs to split each layer over."),
    number("--pipeline-parallel-size", 1, 1, "GPUs to distribute the layers over."),
    number("--data-parallel-size", 1, 1, "Engines to run in parallel, each in its own process."),
    choice("--distributed-executor-backend", ["mp", "ray"], None, "vLLM's executor; ray spans several machines."),
    click.option(
        "--gpu-memory-utilization", type=click.FloatRange(0.05, 1), default=0.85, show_default=True,
        help="Fraction of each GPU's memory that vLLM uses.",
    ),
)  # fmt: skip
measuring_options = together(
    click.option(
        "--suite",
        "suites",
        cls=ListingOption,
        listing=suite_listing,
        callback=converted_by(words),
        default="refusal,behaviour,form,loss,kl,other",
        show_default=True,
        help="What to measure.",
    ),
    click.option("--data", type=path(), metavar="DIR", help="Local copies of public sets: DIR/OWNER/NAME/SPLIT.jsonl."),
    click.option(
        "--judge",
        "judges",
        cls=ListingOption,
        listing=judge_listing,
        callback=converted_by(judge_names),
        default="none",
        show_default=True,
        help="Judge models for the answers.",
    ),
    engine_option,
    number("--max-new-tokens", 1, LEAST_TOKENS, "Maximum length of every answer."),
    number("--limit", 1, None, "Maximum number of items per set."),
    parallel_options,
    hf_device_option,
)
extract_options = together(
    click.option("--out", type=path(), required=True, help="Run folder to create or resume."),
    click.option("--force", is_flag=True, help="Redo the stages whose inputs changed (all of them if none did)."),
    click.option("--concept", help="A named contrast: cooking (the demo's), lists or refusal."),
    click.option("--positive", metavar="P", help="Prompts that show the concept."),
    click.option("--negative", metavar="P", help="Prompts that do not."),
    choice("--goal", GOALS, "remove", "What for: remove the behaviour, extend it, or keep only what is right of it."),
    click.option("--target", metavar="P", help="For --goal strengthen: prompts that are to show the behaviour."),
    click.option(
        "--preserve",
        multiple=True,
        metavar="P",
        help="Prompts whose outputs must not move, such as refusals to keep or another language; repeatable.",
    ),
    click.option("--column", help="Column or key that holds the prompt text."),
    click.option("--split", "hub_split", default="train", show_default=True, help="Split of a Hub dataset."),
    click.option("--data", type=path(), metavar="DIR", help="Local copies of a concept's public sets, as for eval."),
    click.option(
        "--finders",
        "--methods",
        "finders",
        cls=ListingOption,
        listing=finder_listing,
        callback=converted_by(words),
        default=",".join(DEFAULT_FINDERS),
        show_default=True,
        help="How to find directions:",
    ),
    choice(
        "--engine",
        ["auto", "hf", "stream"],
        "auto",
        "How the model is held: whole on one device (hf), or one block at a time, for models of any size (stream).",
    ),
    number("--train", 6, 128, "Prompts per side to find directions with."),
    number("--val", 1, 32, "Prompts per side to select with."),
    number("--test", 0, 100, "Prompts per side kept for eval."),
    number("--trials", 0, 32, "Whole edits to try; 0 skips the search."),
    click.option(
        "--own-answers",
        type=path(),
        metavar="FILE",
        help="For --engine stream, which generates nothing: rows of prompt and answer, the model's own.",
    ),
    click.option("--judge", help="Judge that confirms the best edits by their answers; by wording without one."),
    click.option(
        "--behaviour-tokens",
        metavar="T,T",
        callback=converted_by(tokens),
        help="First tokens of the behaviour; learnt by default.",
    ),
    click.option(
        "--no-filter",
        "filtered",
        is_flag=True,
        callback=converted_by(operator.not_),
        help="Keep prompts on which the model does not behave as expected.",
    ),
    click.option("--system", help="System prompt."),
    click.option(
        "--template-argument",
        "template_arguments",
        multiple=True,
        metavar="NAME=VALUE",
        callback=converted_by(template_arguments),
        help="Passed to the chat template.",
    ),
    click.option(
        "--no-chat-template",
        "chat_template",
        is_flag=True,
        callback=converted_by(operator.not_),
        help="Send prompts without the chat template.",
    ),
    click.option(
        "--sensitive", is_flag=True, help="Mark your own prompts as sensitive: eval folds them and can --redact them."
    ),
    click.option(
        "--mean",
        default="arithmetic",
        show_default=True,
        help="How dim averages prompts: arithmetic, or robust to outliers: winsorized (at 0.995; winsorized:0.95 for "
        "another quantile) or geometric-median.",
    ),
    choice(
        "--orthogonal-to",
        ["harmless-mean"],
        None,
        "Make directions orthogonal to the negative prompts' mean activation; off by default, never for leace.",
    ),
    number("--max-rank", 1, None, "Maximum number of INLP directions; default 20."),
    choice("--solver", ["newton", "sklearn"], "newton", "Solver for INLP."),
    choice("--classifier", ["logistic", "svm"], "logistic", "Classifier for INLP; svm needs --solver sklearn."),
    click.option(
        "--scoring",
        callback=converted_by(words),
        default="local",
        show_default=True,
        help="local, or local,global to also score edits at every layer.",
    ),
    choice("--stage", ["prompts", "activations", "directions", "answers", "selection"], None, "Run only this stage."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        callback=converted_by(torch_dtype),
        help="Default: chosen by device.",
    ),
    click.option("--seed", default=0, show_default=True, help="Random seed."),
    number("--seeds", 1, 1, "Random halvings of the prompts, to measure how stable directions are; 1 skips this."),
    click.option("--trust-remote-code", is_flag=True, help="Run code from the model's repository."),
    revision_option,
    device_option,
)


def engine_options(options: dict[str, Any]) -> Any:
    """The engine's options, taken out of a command's."""
    from ..engines.base import EngineOptions

    names = (
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend",
        "gpu_memory_utilization",
    )  # fmt: skip
    return EngineOptions(device=options.pop("device"), **{name: options.pop(name) for name in names})
