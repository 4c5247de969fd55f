"""The options of `push`."""

from __future__ import annotations

import click

from .common import choice, together
from .existing import BASE_NAME, REPORT

push_options = together(
    click.option("--public", is_flag=True, help="Make the repository public; by default it is private."),
    click.option("--report", type=REPORT, metavar="DIR", help="Folder written by eval, for the card."),
    click.option("--dry-run", is_flag=True, help="List the files and their sizes, and send nothing."),
    click.option("--recipe-only", is_flag=True, help="Upload recipe, card and report, without weights."),
    click.option("--title", help="The card's title; default: the base's name."),
    click.option("--concept", help="What the edit is about, for the card; default: the run's."),
    click.option(
        "--base-model",
        type=BASE_NAME,
        metavar="OWNER/NAME",
        help="The base's name on the Hub, if it is a local folder.",
    ),
    choice("--gated", ["auto", "manual"], None, "Ask who downloads to accept terms (auto), or for your approval."),
    click.option("--branch", help="Upload to this branch, which is created if need be."),
    click.option("--create-pr", is_flag=True, help="Open a pull request on an existing repository."),
    click.option("--message", help="The commit's message."),
    click.option("--no-verify", is_flag=True, help="Upload a checkpoint that was not verified, or failed to be."),
)
