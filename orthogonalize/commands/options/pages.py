"""Help pages: the options of each command in groups, common ones first, and two examples.

The commands themselves say what each option does; here is only where it stands on the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from .effective import remember


@dataclass(frozen=True)
class Page:
    """The help page of one command: its options by group, without their dashes, and its examples."""

    groups: Mapping[str, str]
    examples: Sequence[str]


PARALLEL = (
    "tensor-parallel-size pipeline-parallel-size data-parallel-size distributed-executor-backend gpu-memory-utilization"
)
OUTPUT, MACHINE, MODEL, RARE = "Output", "Where it runs", "The model", "Rarely needed"

PAGES: dict[str, Page] = {
    "extract": Page(
        {
            "The contrast": "concept positive negative preserve goal target column split data sensitive",
            OUTPUT: "out force json track",
            "How much": "train val test trials finders scored enough layers positions",
            "What shows the behaviour": "measure judge wording behaviour-tokens no-filter",
            "How prompts are sent": "system thinking template-argument no-chat-template",
            MACHINE: f"engine device dtype own-answers {PARALLEL}",
            MODEL: "revision no-download trust-remote-code description",
            "Directions": "mean orthogonal-to max-rank solver classifier scoring",
            RARE: "stage seed seeds",
        },
        (
            "orthogonalize extract meta-llama/Llama-3.2-1B-Instruct --concept refusal --out run",
            "orthogonalize extract MODEL --positive asks.txt --negative others.txt --preserve keep.jsonl --out run",
        ),
    ),
    "edit": Page(
        {
            "What to edit": "run pick recipe direction",
            OUTPUT: "out force cache format quantize link",
            "A new edit": "method scope strength finder layer position per-layer site-strengths",
            "Options of single methods": "rank alpha coefficient to orthogonal",
            "Options of conditional": "span components target-weight preserve-weight first-weight ridge sequential",
            MODEL: "revision no-download description",
            RARE: "rounding workers shard device",
        },
        (
            "orthogonalize edit meta-llama/Llama-3.2-1B-Instruct --run run --out edited",
            "orthogonalize edit MODEL --run run --method ablate --scope all --format lora --out adapter",
        ),
    ),
    "eval": Page(
        {
            "What is compared": "base run",
            OUTPUT: "out force json track card redact",
            "What is measured": "suite prompts judge limit max-new-tokens measure data",
            MACHINE: f"engine device separate-engines {PARALLEL}",
            RARE: "allow-other-base revision",
        },
        (
            "orthogonalize eval edited --base meta-llama/Llama-3.2-1B-Instruct --run run --out report",
            "orthogonalize eval edited --base MODEL --run run --suite refusal,kl,mmlu --engine hf --out report",
        ),
    ),
    "chat": Page(
        {
            "Whom to talk to": "base run pick endpoint",
            "What is said": "prompts report save system thinking max-new-tokens",
            MACHINE: "engine device",
        },
        (
            "orthogonalize chat edited --base meta-llama/Llama-3.2-1B-Instruct --prompts questions.txt",
            "orthogonalize chat --run run --pick 3",
        ),
    ),
    "push": Page(
        {
            "What is sent": "report recipe-only dry-run",
            "Who sees it": "public gated",
            "The card": "title concept base-model",
            "The commit": "branch create-pr message",
            RARE: "no-verify",
        },
        (
            "orthogonalize push edited you/llama-edited --report report --dry-run",
            "orthogonalize push edited you/llama-edited --report report --public",
        ),
    ),
    "verify": Page(
        {"What is compared": "base no-logits", OUTPUT: "json no-record", RARE: "device allow-other-base"},
        (
            "orthogonalize verify edited",
            "orthogonalize verify somebody/edited --base MODEL --no-logits --json",
        ),
    ),
    "sweep": Page(
        {
            "What is tried": "run methods scopes strengths alphas ranks multipliers at",
            OUTPUT: "out force json track",
            "What is measured": "suite judge limit max-new-tokens measure data",
            MACHINE: f"engine device {PARALLEL}",
            RARE: "semantics allow-other-base description revision",
        },
        (
            "orthogonalize sweep MODEL --run run --out sweep",
            "orthogonalize sweep MODEL --run run --methods ablate,leace --scopes one,all --engine hf --out sweep",
        ),
    ),
    "merge": Page(
        {"Options": "out base force"},
        (
            "orthogonalize merge adapter --out merged",
            "orthogonalize merge adapter --base MODEL --out merged --force",
        ),
    ),
    "judge": Page(
        {"Options": "judge json", MACHINE: f"engine device {PARALLEL}"},
        (
            "orthogonalize judge report --judge wildguard",
            "orthogonalize judge answers.json --judge prefix --json",
        ),
    ),
    "compare": Page(
        {"Options": "json"},
        ("orthogonalize compare report other-report", "orthogonalize compare report other/report.json --json"),
    ),
    "plot": Page(
        {"Options": "out figure width force"},
        (
            "orthogonalize plot report --out rates.pdf",
            "orthogonalize plot run --figure trials --width 6.9 --out trials.svg",
        ),
    ),
    "rank": Page(
        {"Filters": "kl induce prune", OUTPUT: "most write json"},
        ("orthogonalize rank run --kl 0.2", "orthogonalize rank run --kl 0.2 --prune 0.3 --write"),
    ),
    "describe": Page(
        {"Options": "out revision"},
        ("orthogonalize describe owner/new-model", "orthogonalize describe owner/new-model --out new_model.toml"),
    ),
    "demo": Page(
        {"Options": "out goal engine force json"},
        ("orthogonalize demo", "orthogonalize demo --goal calibrate --engine hf --out demo-calibrate"),
    ),
    "doctor": Page(
        {"Options": "no-network json"},
        ("orthogonalize doctor", "orthogonalize doctor --no-network --json"),
    ),
}  # fmt: skip
OTHERS = "Other options"


class Command(click.Command):
    """A command whose help has its options in the groups of `PAGES`, and its examples at the end."""

    @property
    def page(self) -> Page:
        """Where its options stand; those of a command of somebody else's are in no group."""
        return PAGES.get(str(self.name), Page({}, ()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, list(args))
        if not ctx.resilient_parsing:
            remember(self, ctx, args)
        return rest

    def option_groups(self, ctx: click.Context) -> dict[str, list[click.Option]]:
        """The options of each group; those that are in none come last, with --help."""
        options = {_word(each): each for each in self.get_params(ctx) if isinstance(each, click.Option)}
        groups = {title: [options.pop(name) for name in names.split()] for title, names in self.page.groups.items()}
        return {**groups, OTHERS if groups else "Options": list(options.values())}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, options in self.option_groups(ctx).items():
            records = [record for each in options if (record := each.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records, col_max=26)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.page.examples:
            with formatter.section("Examples"):
                for example in self.page.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{example}\n")
        super().format_epilog(ctx, formatter)


def _word(option: Any) -> str:
    """The long name of an option, without its dashes; of --per-layer/--shared, the first."""
    return str(max(option.opts, key=len)).lstrip("-")
