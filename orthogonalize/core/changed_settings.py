"""Copies of a command's settings with some of them changed by keyword."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import OrthogonalizeError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def change_settings(settings: Settings, command: str, changes: dict[str, Any]) -> Settings:
    """A copy of the dataclass `settings` of `command` with other values.

    Raises:
        OrthogonalizeError: there is no such setting.
    """
    names = [field.name for field in fields(settings)]
    unknown = sorted(changes.keys() - set(names))
    if unknown:
        raise OrthogonalizeError(f"{command} has no setting {unknown[0]!r}; available: {', '.join(names)}")
    return replace(settings, **changes)
