"""Types of options that name something: a misspelt name is refused before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ...core.errors import OrthogonalizeError
from ...core.output_folders import RUN, FolderKind, check_file, check_finished_run, check_free, check_run_folder
from ...data.prompts import check_source
from ...models.names import check_adapter_name, check_folder_name, check_model_name, is_hub_id
from ..publishing.settings import check_repository

Value = TypeVar("Value")


def _check_exists(text: str) -> None:
    if not Path(text).exists():
        raise OrthogonalizeError(f"no such file: {text}")


def _check_file(text: str) -> None:
    _check_exists(text)
    if not Path(text).is_file():
        raise OrthogonalizeError(f"{text} is a folder, not a file")


def _check_folder(text: str) -> None:
    if not Path(text).is_dir():
        raise OrthogonalizeError(f"no such folder: {text}")


def _check_report(text: str) -> None:
    path = Path(text)
    if not path.is_file() and not (path / "report.json").is_file():
        raise OrthogonalizeError(f"no report at {text}; eval makes one")


def _check_recipe(text: str) -> None:
    if not Path(text).exists() and not is_hub_id(text):
        raise OrthogonalizeError(f"no such recipe: {text} is neither a file nor of the form owner/name")


def _check_judge(text: str) -> None:
    from ...evals.judges.registry import check_judge

    check_judge(text)


def _check_measure(text: str) -> None:
    from ...evals.measures.registry import check_measure

    check_measure(text)


class Named(click.ParamType[Value]):
    """A name that `check` accepts, converted by `kind`."""

    def __init__(self, name: str, check: Callable[[str], None], kind: Callable[[str], Value]) -> None:
        self.name, self.check, self.kind = name, check, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Value:
        self.check(str(value))
        return self.kind(str(value))


class NewFolder(click.ParamType[Path]):
    """A folder of a kind to create; `--force`, which has to be eager, replaces one of this kind."""

    name = "path"

    def __init__(self, kind: FolderKind) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        check_free(Path(value), self.kind, force=ctx is not None and bool(ctx.params.get("force")))
        return Path(value)


MODEL = Named("model", check_model_name, str)
CHECKPOINT = Named("path", check_folder_name, Path)
RUN_FOLDER = Named("path", lambda text: check_finished_run(Path(text)), Path)
RUN_TO_MAKE = Named("path", lambda text: check_run_folder(Path(text), RUN), Path)
ADAPTER = Named("path", check_adapter_name, Path)
RECIPE = Named("recipe", _check_recipe, str)
REPORT = Named("path", _check_report, Path)
FILE = Named("path", _check_file, Path)
FILE_OR_FOLDER = Named("path", _check_exists, Path)
FOLDER = Named("path", _check_folder, Path)
NEW_FILE = Named("path", lambda text: check_file(Path(text)), Path)
SOURCE = Named("source", check_source, str)
REPOSITORY = Named("repository", check_repository, str)
BASE_NAME = Named("repository", lambda text: check_repository(text, "--base-model"), str)
JUDGE = Named("name", _check_judge, str)
MEASURE = Named("name", _check_measure, str)
