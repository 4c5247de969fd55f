"""The options of `extract`."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

import click

from ...core.errors import OrthogonalizeError
from ...core.files import parse_json
from ...data.prompts import GOALS
from ...data.thoughts import THINKING
from ...directions.finders.registry import DEFAULT_FINDERS, FINDERS
from .common import (
    ListingOption,
    choice,
    converted_by,
    description_option,
    device_option,
    download_option,
    number,
    parallel_options,
    revision_option,
    together,
    words,
)
from .existing import FILE, FOLDER, JUDGE, MEASURE, RUN_TO_MAKE, SOURCE


def finder_listing() -> str:
    """Every value of --finders, and what it finds."""
    return "; ".join(f"{finder.name} ({finder.summary})" for finder in FINDERS.values()) + "."


def measure_listing() -> str:
    """Every value of --measure, and what it says."""
    from ...evals.measures.registry import AUTO, MEASURES

    found = "; ".join(f"{measure.usage} ({measure.summary})" for measure in MEASURES.values())
    return f"{found}; {AUTO} takes the first that tells the two sides apart."


def tokens(text: str | None) -> list[int | str] | None:
    """Behaviour tokens in a comma-separated list: numbers are token ids, anything else is text."""
    return [int(w) if w.isdecimal() else w for w in words(text)] or None


def whole_numbers(text: str | None) -> list[int] | None:
    """The numbers in a comma-separated list, in which `3-7` stands for 3 to 7; None if none is given."""
    found: list[int] = []
    for word in words(text):
        matched = re.fullmatch(r"(\d{1,5})-(\d{1,5})|(-?\d{1,5})", word)
        if matched is None:
            raise click.BadParameter(f"{word!r} is neither a number nor a range such as 3-7")
        first, last, single = matched.groups()
        found += [int(single)] if single else range(int(first), int(last) + 1)
    return found or None


def template_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Arguments of the chat template from `NAME=VALUE` pairs; a value is JSON, or else text."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise OrthogonalizeError(f"--template-argument {pair!r} is not of the form name=value")
        try:
            arguments[key] = parse_json(value)
        except ValueError:
            arguments[key] = value
    return arguments


def torch_dtype(name: str | None) -> Any:
    """The torch dtype called `name`; None stays None."""
    import torch

    return getattr(torch, name) if name else None


extract_options = together(
    click.option("--out", type=RUN_TO_MAKE, required=True, help="Run folder to create or resume."),
    click.option("--force", is_flag=True, help="Redo the stages whose inputs changed (all of them if none did)."),
    click.option(
        "--concept", help="A named contrast: cooking (the demo's), lists or refusal; or what to call one of your own."
    ),
    click.option("--positive", type=SOURCE, metavar="P", help="Prompts that show the concept."),
    click.option("--negative", type=SOURCE, metavar="P", help="Prompts that do not."),
    choice("--goal", GOALS, "remove", "What for: remove the behaviour, extend it, or keep only what is right of it."),
    click.option(
        "--target", type=SOURCE, metavar="P", help="For --goal strengthen: prompts that are to show the behaviour."
    ),
    click.option(
        "--preserve",
        type=SOURCE,
        multiple=True,
        metavar="P",
        help="Prompts whose outputs must not move, such as refusals to keep or another language; repeatable.",
    ),
    click.option("--column", help="Column or key that holds the prompt text."),
    click.option("--split", "hub_split", default="train", show_default=True, help="Split of a Hub dataset."),
    click.option("--data", type=FOLDER, metavar="DIR", help="Local copies of a concept's public sets, as for eval."),
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
        ["auto", "hf", "stream", "vllm"],
        "auto",
        "How the model is held: whole (hf), in vLLM, on several GPUs if need be (vllm), or one block at a time, for "
        "models of any size (stream).",
    ),
    number("--train", 6, 128, "Prompts per side to find directions with."),
    number("--val", 1, 48, "Prompts per side to select with."),
    number("--test", 0, 100, "Prompts per side kept for eval."),
    number("--trials", 0, 32, "Whole edits to try at most; 0 skips the search."),
    click.option(
        "--own-answers",
        type=FILE,
        metavar="FILE",
        help="For --engine stream, which generates nothing: rows of prompt and answer, the model's own.",
    ),
    click.option(
        "--measure",
        type=MEASURE,
        cls=ListingOption,
        listing=measure_listing,
        default="auto",
        show_default=True,
        help="What shows the behaviour, for the whole run and eval of it:",
    ),
    click.option("--judge", type=JUDGE, metavar="NAME", help="Short for --measure judge:NAME."),
    click.option("--wording", type=FILE, metavar="FILE", help="Phrases that show it, one per line; default: refusals."),
    choice(
        "--thinking",
        THINKING,
        "off",
        "Thoughts before answers: turned off by the template; skip: closed before every answer; keep.",
    ),
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
    click.option(
        "--layers",
        metavar="L,L-L",
        callback=converted_by(whole_numbers),
        help="Layers whose directions are scored, such as 8-20; default: all.",
    ),
    click.option(
        "--positions",
        metavar="P,P",
        callback=converted_by(whole_numbers),
        help="Tokens whose directions are scored, counted from the end of the prompt, such as -1,-2; default: all that "
        "the template adds.",
    ),
    number("--scored", 1, 16, "Val prompts per side by which directions are scored; whole edits are tried on all."),
    number("--enough", 0, 8, "Directions per finder that are scored: the best by estimates of all; 0 scores all."),
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
    description_option,
    download_option,
    revision_option,
    device_option,
    parallel_options,
)
