"""Commands about this machine: doctor."""

from __future__ import annotations

import json

import click

from .._console import show_findings


@click.command()
@click.option("--no-network", is_flag=True, help="Do not ask the Hub anything.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(no_network: bool, as_json: bool) -> None:
    """Say what this machine can do for the tool, and what to change: Python, torch, vLLM, memory, disk, the Hub.

    Nothing is changed, and no token is shown.
    """
    from ..doctor import doctor as examine

    found = examine(network=not no_network)
    if as_json:
        click.echo(json.dumps([each.document() for each in found], indent=1))
    else:
        show_findings(found)
