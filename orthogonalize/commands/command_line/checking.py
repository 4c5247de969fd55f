"""Commands that compare what is stored: verify, compare."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .._console import show_audit, show_comparison
from ..options.common import device_option, json_option, other_base_option
from ..options.existing import CHECKPOINT, MODEL, REPORT
from ..options.pages import Command
from .as_json import echo_json


@click.command(cls=Command)
@click.argument("checkpoint", type=CHECKPOINT)
@click.option("--base", type=MODEL, metavar="MODEL", help="The model that was edited; default: the recipe's.")
@click.option("--no-logits", is_flag=True, help="Compare bytes only.")
@click.option("--no-record", is_flag=True, help="Do not write the result into the recipe.")
@other_base_option
@json_option
@device_option
def verify(
    checkpoint: Path,
    base: str | None,
    no_logits: bool,
    no_record: bool,
    allow_other_base: bool,
    as_json: bool,
    device: str,
) -> None:
    """Audit how CHECKPOINT differs from its base; with a recipe, prove that hooks = weights.

    Any two checkpoints can be compared: what changed, by what rank, along which directions, and whether
    something was projected out.
    """
    from ..verify import verify as run_verify

    audit = run_verify(
        checkpoint,
        base,
        device=device,
        logits=not no_logits,
        record=not no_record,
        allow_other_base=allow_other_base,
    )
    if as_json:
        echo_json(audit.document())
    else:
        show_audit(audit)
    if audit.verification is not None and not audit.verification.passed:
        sys.exit(1)


@click.command(cls=Command)
@click.argument("first", type=REPORT)
@click.argument("second", type=REPORT)
@json_option
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Set two reports of eval side by side: FIRST and SECOND are folders made by eval, or their report.json.

    Refusals are compared prompt by prompt, other measures by their values.
    """
    from ..compare import compare as run_compare

    found = run_compare(first, second)
    if as_json:
        echo_json(found.document())
    else:
        show_comparison(found)
