"""Commands that talk: chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ...data.thoughts import THINKING
from ..options.common import Entry, choice, engine_names, hf_device_option, number
from ..options.existing import CHECKPOINT, MODEL, NEW_FILE, REPORT, RUN_FOLDER, SOURCE
from ..options.pages import Command


def _read() -> str | None:
    """The next line of the user; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


@click.command(cls=Command)
@click.argument("checkpoint", type=CHECKPOINT, required=False)
@click.option("--base", type=MODEL, metavar="MODEL", help="The model that was edited; default: the recipe's or run's.")
@click.option("--run", type=RUN_FOLDER, help="Without CHECKPOINT: make this run's edit with hooks. Brings prompts.")
@number("--pick", 1, None, "With --run: edit N of those that extract lists; default: the best.")
@click.option(
    "--endpoint", "endpoints", multiple=True, metavar="URL[#MODEL]",
    help="Talk to a server instead, such as vllm serve; twice: the edited model's, then the base's.",
)  # fmt: skip
@click.option("--prompts", type=SOURCE, metavar="P", help="Prompts for /next.")
@click.option("--report", type=REPORT, metavar="DIR", help="A report of eval, whose prompts /next takes.")
@click.option("--save", type=NEW_FILE, metavar="FILE", help="Store every exchange, as JSON Lines.")
@click.option("--engine", type=Entry(engine_names), default="hf", show_default=True, help="Inference engine.")
@number("--max-new-tokens", 1, 256, "Maximum length of every answer.")
@click.option("--system", help="System prompt; default: the run's.")
@choice("--thinking", THINKING, "off", "Thoughts before answers, if there is no run: off, skip or keep, as in extract.")
@hf_device_option
def chat(checkpoint: Path | None, device: str, **options: Any) -> None:
    """Talk to a model and its edit: both answers side by side, as they are written.

    CHECKPOINT and its base share one engine, into which the weights of either are swapped. With --run alone, hooks make
    the edit and nothing is written. Each side remembers its own answers. /next asks the next prompt, /new begins a new
    conversation, /save stores what was said, /quit ends.
    """
    from ...engines.base import EngineOptions
    from ..chat import Talk
    from ..chat import chat as run_chat

    run_chat(checkpoint, Talk(options=EngineOptions(device=device), **options), _read)
