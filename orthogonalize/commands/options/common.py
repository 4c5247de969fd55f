"""Groups of click options, their types and the conversion of their values."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ...core.errors import OrthogonalizeError
from ...core.output_folders import FolderKind
from ...data.refusals import LEAST_TOKENS
from ...edits.methods.registry import METHODS
from .existing import FILE, FOLDER, MEASURE, NewFolder


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


def finders_by_method() -> str:
    """The finders of each method that takes the directions of several."""
    several = (method for method in METHODS.values() if len(method.finders) > 1)
    return "; ".join(f"{method.name}: {', '.join(method.finders)}" for method in several) + "."


def method_listing() -> str:
    """Every value of --methods of `sweep`."""
    return f"One or more of {', '.join(METHODS)}."


def suite_listing() -> str:
    """Every value of --suite."""
    from ...evals.suites.registry import suite_names

    return f"One or more of {', '.join(suite_names())}."


def judge_listing() -> str:
    """Every value of --judge."""
    from ...evals.judges.registry import model_judges

    return f"One or more of {', '.join(model_judges())}, NAME=MODEL, or endpoint:URL#MODEL."


def engine_names() -> list[str]:
    """The names of all engines."""
    from ...engines.registry import ENGINES

    return list(ENGINES)


def tracker_names() -> list[str]:
    """The names of all trackers."""
    from ...reports.trackers.registry import TRACKERS

    return list(TRACKERS)


def _installed_tracker(name: str | None) -> str | None:
    """The name of a tracker whose package is installed: better to know before anything is measured."""
    from ...reports.trackers.registry import find_tracker

    return None if name is None else find_tracker(name).name


def words(text: str | None) -> list[str]:
    """The words of a comma-separated list."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def judge_names(text: str) -> list[str]:
    """The judges in a comma-separated list, in which `none` stands for no judge."""
    from ...evals.judges.registry import check_judge

    names = [name for name in words(text) if name != "none"]
    for name in names:
        check_judge(name)
    return names


def scope_names(text: str) -> list[str]:
    """The scopes in a comma-separated list; a comma before a number belongs to a scope's layers."""
    return [part.strip() for part in re.split(r",(?!\s*\d)", text) if part.strip()]


def named_sources(given: Sequence[str]) -> dict[str, str]:
    """Prompt sources by name, from `NAME=FILE`, or from `FILE` alone, which is called after itself."""
    from ...data.prompts import check_source, source_names

    sources: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals:
            name, source = source_names([text])[text], text
        if not name or not source or "." in name:
            raise OrthogonalizeError(f"--prompts {text!r} is not of the form NAME=FILE, with a name without dots")
        if name in sources:
            raise OrthogonalizeError(f"--prompts: the name {name!r} is given twice; use NAME=FILE")
        check_source(source)
        sources[name] = source
    return sources


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
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
track_option = click.option(
    "--track", type=Entry(tracker_names), callback=lambda _context, _parameter, name: _installed_tracker(name),
    help="Give the numbers, and nothing else, to this tracker as well.",
)  # fmt: skip


def force_option(help: str) -> Callable[..., Any]:
    """`--force`, which is read first, so that the type of `--out` can ask for it."""
    return click.option("--force", is_flag=True, is_eager=True, help=help)


def out_option(kind: FolderKind) -> Callable[..., Any]:
    """The options for a folder of a `kind` to create."""
    return together(
        click.option(
            "--out", type=NewFolder(kind), required=True, help="Folder to create; it appears only when complete."
        ),
        force_option("Replace OUT if this tool made it."),
    )


other_base_option = click.option(
    "--allow-other-base", is_flag=True, help="Go ahead, and say so, if the weights are not those of the recipe or run."
)
description_option = click.option(
    "--description", type=FILE, metavar="FILE",
    help="TOML file that describes the model's architecture; default: what is shipped, else what experiments find.",
)  # fmt: skip
revision_option = click.option("--revision", help="Branch, tag or commit of a Hub model.")
download_option = click.option(
    "--no-download",
    "download",
    is_flag=True,
    callback=converted_by(lambda given: False if given else None),
    help="Read a Hub model where it is, piece by piece, without keeping it; also done if the disk has no room for it.",
)
hf_device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Device for --engine hf: auto, all (every GPU), cpu, cuda, cuda:1, …",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, all (every GPU of this host), cpu, cuda, cuda:1, …"
)
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
    click.option("--data", type=FOLDER, metavar="DIR", help="Local copies of public sets: DIR/OWNER/NAME/SPLIT.jsonl."),
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
    click.option(
        "--measure",
        type=MEASURE,
        metavar="NAME",
        help="The run's behaviour measure again; needed if that is python:FILE:function.",
    ),
    engine_option,
    number("--max-new-tokens", 1, LEAST_TOKENS, "Maximum length of every answer."),
    number("--limit", 1, None, "Maximum number of items per set."),
    parallel_options,
    hf_device_option,
)


def engine_options(options: dict[str, Any]) -> Any:
    """The engine's options, taken out of a command's."""
    return parallel_engine_options(options, device=options.pop("device"))


def parallel_engine_options(options: dict[str, Any], **others: Any) -> Any:
    """The engine's `parallel_options`, taken out of a command's, with others."""
    from ...engines.base import EngineOptions

    names = (
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend",
        "gpu_memory_utilization",
    )  # fmt: skip
    return EngineOptions(**{name: options.pop(name) for name in names}, **others)


grid_options = together(
    click.option("--strengths", metavar="S,S", help="Strengths to try, of methods that remove. Default: 1."),
    click.option("--alphas", metavar="A,A", help="Values of alpha to try. Default: each method's own."),
    click.option("--ranks", metavar="K,K", help="Ranks to try, as edit takes them. Default: all directions."),
    click.option(
        "--multipliers",
        metavar="M,M",
        help="Lengths to add, with both signs, in units of the mean difference's. Default: 0.5,1,2.",
    ),
    click.option(
        "--at",
        metavar="P,L",
        help="A position and layer to try every direction at as well as at its finder's best, such as -1,12.",
    ),
)


def sweep_grid(options: dict[str, Any]) -> Any:
    """The values that a sweep tries, taken out of its options."""
    from ...selection.grid import OPTIONS, SweepGrid

    return SweepGrid.parse(**{name: options.pop(name) for name in (*OPTIONS, "at")})
