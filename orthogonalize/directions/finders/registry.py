"""The registry of direction finders. To add one, write a module in this folder and list it below."""

from __future__ import annotations

from ...core.registry import Registry
from .base import DirectionFinder

MODULES = ("dim", "inlp", "leace")
DEFAULT_FINDERS = MODULES  # a registered finder must be asked for, so that it does not change existing runs

FINDERS: Registry[DirectionFinder] = Registry("direction finder")
FINDERS.add_modules(__package__, MODULES, "FINDER")
