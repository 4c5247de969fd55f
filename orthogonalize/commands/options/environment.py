"""Environment variables of options: named as on the command line, whatever the functions call them."""

from __future__ import annotations

import click


def variable(prefix: str, command: str, option: click.Option) -> str:
    """The variable of an option, such as ORTHOGONALIZE_EVAL_SUITE of `eval --suite`."""
    word = max(option.opts, key=len).lstrip("-")
    return f"{prefix}_{command}_{word}".upper().replace("-", "_")


def name_variables(command: click.Command, prefix: str) -> None:
    """Let every option of `command` be set by the variable of its own name.

    click names variables after parameters of functions, which some options call differently.
    """
    for option in command.params:
        if isinstance(option, click.Option) and option.envvar is None:
            option.envvar = variable(prefix, str(command.name), option)
