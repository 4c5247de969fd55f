"""The options that a command ran with, as a file that `--config` reads: it is saved beside what the command made.

The file holds what was given on the command line, in the environment and in another file, and the defaults; paths stay
as they were given. Nothing that is published has it: a push uploads what the recipe lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ...core.errors import OrthogonalizeError
from ...core.files import write_atomically
from ...core.output_folders import CONFIG

RAW = "orthogonalize.raw options"  # where a context keeps them
LEFT_OUT = frozenset({"force", "json", "help"})  # what is not to be repeated by reading a file
NUMBERS = (type(click.INT), type(click.FLOAT), type(click.BOOL))


def key_of(parameter: click.Parameter) -> str:
    """The key of a parameter in such a file: an option's long name without its dashes, or an argument's name."""
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len).lstrip("-")
    return str(parameter.name)


def remember(command: click.Command, ctx: click.Context, words: Sequence[str]) -> None:
    """Keep what every parameter is given, before it is converted."""
    given, _, _ = command.make_parser(ctx).parse_args(list(words))
    found = {}
    for parameter in command.get_params(ctx):
        key = key_of(parameter)
        value, _ = parameter.consume_value(ctx, given)
        if isinstance(value, str) and isinstance(parameter.type, NUMBERS):
            value = parameter.type(value)  # a text where it comes from the command line or the environment
        plain = _plain(value)
        given_something = plain is not None and plain is not False and plain != []  # 0 is something
        if key not in LEFT_OUT and given_something:
            found[key] = plain
        elif plain is False and isinstance(parameter, click.Option) and parameter.secondary_opts:
            found[key] = False  # of two words for yes and no, the second was given
    ctx.meta[RAW] = found


def _plain(value: Any) -> str | int | float | bool | list[str] | None:
    """A value as TOML has it; None for one that is not given."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    return list(map(str, value)) if isinstance(value, tuple | list) else None


def as_toml(command: str, options: Mapping[str, Any]) -> str:
    """The table of one command."""
    lines = [f"{key} = {_toml(value)}\n" for key, value in options.items()]
    return f"[{command}]\n" + "".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):  # a basic string is one of JSON, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def save_config(folder: Path | None) -> None:
    """Write the options of the command that is running into the folder that it made, if there is one.

    Raises:
        OrthogonalizeError: the file cannot be written.
    """
    ctx = click.get_current_context()
    if folder is None or not folder.is_dir():
        return
    try:
        write_atomically(folder / CONFIG, as_toml(str(ctx.command.name), ctx.meta[RAW]))
    except OSError as error:
        raise OrthogonalizeError(f"{folder / CONFIG} cannot be written: {error.strerror}") from error
