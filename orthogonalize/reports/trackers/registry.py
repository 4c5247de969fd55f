"""The trackers that `--track` can name. To add one, write a file with a `TRACKER` and name it in `MODULES`."""

from __future__ import annotations

import importlib.util

from ...core.errors import OrthogonalizeError
from ...core.registry import Registry
from .base import TrackerEntry

MODULES = ("tensorboard", "trackio", "wandb")  # in the order of help texts and messages

TRACKERS: Registry[TrackerEntry] = Registry("tracker")
TRACKERS.add_modules(__package__, MODULES, "TRACKER")


def find_tracker(name: str) -> TrackerEntry:
    """The tracker called `name`, whose package is installed.

    Raises:
        OrthogonalizeError: there is none, or its package is missing.
    """
    entry = TRACKERS.find(name)
    if importlib.util.find_spec(entry.module) is None:
        raise OrthogonalizeError(f"--track {name} needs {entry.module}, which is not installed; {entry.install}")
    return entry
