"""Options from one TOML file that mirrors the command line: a table for each command, a key for each option."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ...core.errors import OrthogonalizeError, first_line


def read_config(file: Path, group: click.Group) -> dict[str, dict[str, Any]]:
    """The defaults that `file` sets, by command and by name of parameter, as click's `default_map` takes them.

    A key is an option's name without its dashes, as in `max-new-tokens = 64`, or that of an argument, as in
    `model = "owner/name"`; a list stands for a comma-separated one, or for an option given several times.

    Raises:
        OrthogonalizeError: the file cannot be read, or names a command or an option that there is not.
    """
    try:
        tables = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise OrthogonalizeError(f"--config {file} cannot be read as TOML: {first_line(error)}") from error
    found: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        command = group.commands.get(name)
        if command is None or not isinstance(table, Mapping):
            raise OrthogonalizeError(f"--config {file}: there is no command {name!r}; tables are named after commands")
        found[name] = dict(_setting(file, command, key, value) for key, value in table.items())
    return found


def _setting(file: Path, command: click.Command, key: str, value: Any) -> tuple[str, Any]:
    wanted = f"--{key.replace('_', '-')}"
    for option in command.params:
        if isinstance(option, click.Argument) and option.name == key:
            return key, value
        if isinstance(option, click.Option) and wanted in (*option.opts, *option.secondary_opts):
            if wanted in option.secondary_opts:
                value = not value
            if isinstance(value, list) and not option.multiple:
                value = ",".join(map(str, value))
            return str(option.name), value
    raise OrthogonalizeError(f"--config {file}: {command.name} has no option {wanted}")
