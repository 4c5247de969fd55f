"""Types of options that name something: a misspelt name is refused before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ...core.errors import OrthogonalizeError
from ...core.output_folders import check_finished_run
from ...data.prompts import check_source
from ...models.names import check_adapter_name, check_folder_name, check_model_name, is_hub_id

Value = TypeVar("Value")


def _check_exists(text: str) -> None:
    if not Path(text).exists():
        raise OrthogonalizeError(f"no such file: {text}")


def _check_recipe(text: str) -> None:
    if not Path(text).exists() and not is_hub_id(text):
        raise OrthogonalizeError(f"no such recipe: {text} is neither a file nor of the form owner/name")


class Named(click.ParamType[Value]):
    """A name that `check` accepts, converted by `kind`."""

    def __init__(self, name: str, check: Callable[[str], None], kind: Callable[[str], Value]) -> None:
        self.name, self.check, self.kind = name, check, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Value:
        self.check(str(value))
        return self.kind(str(value))


MODEL = Named("model", check_model_name, str)
CHECKPOINT = Named("path", check_folder_name, Path)
RUN_FOLDER = Named("path", lambda text: check_finished_run(Path(text)), Path)
ADAPTER = Named("path", check_adapter_name, Path)
RECIPE = Named("recipe", _check_recipe, str)
FILE = Named("path", _check_exists, Path)
SOURCE = Named("source", check_source, str)
