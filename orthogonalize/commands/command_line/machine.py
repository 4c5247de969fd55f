"""Commands about this machine: doctor."""

from __future__ import annotations

import click

from .._console import show_findings
from ..options.common import json_option
from ..options.pages import Command
from .as_json import echo_json


@click.command(cls=Command)
@click.option("--no-network", is_flag=True, help="Do not ask the Hub anything.")
@json_option
def doctor(no_network: bool, as_json: bool) -> None:
    """Say what this machine can do for the tool, and what to change: Python, torch, vLLM, memory, disk, the Hub.

    Nothing is changed, and no token is shown.
    """
    from ..doctor import doctor as examine

    found = examine(network=not no_network)
    if as_json:
        echo_json([each.document() for each in found])
    else:
        show_findings(found)
