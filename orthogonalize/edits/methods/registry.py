"""The registry of edit methods. To add one, write a module in this folder and list it below."""

from __future__ import annotations

from ...core.registry import Registry
from .base import EditMethod

MODULES = ("ablate", "nullspace", "reflect", "actadd", "leace", "conditional")
DEFAULT = "ablate"

METHODS: Registry[EditMethod] = Registry("edit method")
METHODS.add_modules(__package__, MODULES, "METHOD")
