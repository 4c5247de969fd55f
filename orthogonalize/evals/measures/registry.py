"""The behaviour measures that `--measure` can name. To add one, write a module in this folder and name it in `MODULES`.

Code outside this package calls `MEASURES.add(...)` instead. This module and those that it imports do not import torch.
"""

from __future__ import annotations

from ...core.errors import OrthogonalizeError
from ...core.registry import Registry
from .base import AnswerMeasure, Measure

AUTO = "auto"
MODULES = ("first_token", "wording", "judge", "python", "direction")  # in the order of help texts

MEASURES: Registry[Measure] = Registry("behaviour measure")
MEASURES.add_modules(__package__, MODULES, "MEASURE")


def measure_usages() -> list[str]:
    """Every value of `--measure`, with arguments in capitals."""
    return [AUTO, *(measure.usage for measure in MEASURES.values())]


def find_measure(text: str) -> tuple[Measure, str]:
    """The measure that `NAME` or `NAME:ARGUMENT` names, and its argument.

    Raises:
        OrthogonalizeError: there is none, or an argument is missing or not taken.
    """
    name, colon, argument = text.partition(":")
    if name not in MEASURES:
        raise OrthogonalizeError(f"unknown behaviour measure {text!r}; available: {', '.join(measure_usages())}")
    measure = MEASURES[name]
    taken = measure.argument if isinstance(measure, AnswerMeasure) else ""
    if bool(taken) != bool(argument) or (colon and not argument):
        raise OrthogonalizeError(f"--measure {text} is not of the form {measure.usage}")
    return measure, argument


def check_measure(text: str) -> None:
    """Check a value of `--measure`, without loading anything.

    Raises:
        OrthogonalizeError: as `find_measure`, or the argument names nothing.
    """
    if text != AUTO:
        measure, argument = find_measure(text)
        if isinstance(measure, AnswerMeasure):
            measure.check(argument)
