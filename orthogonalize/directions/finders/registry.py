"""The registry of direction finders. To add one: a file in this folder, and its name below."""

from __future__ import annotations

from ...core.registry import Registry
from .base import DirectionFinder

MODULES = ("dim", "inlp", "leace")

FINDERS: Registry[DirectionFinder] = Registry("direction finder")
FINDERS.add_modules(__package__, MODULES, "FINDER")
