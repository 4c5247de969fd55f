"""The values that a sweep tries: strengths, alphas, ranks, and lengths of added directions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..core.errors import OrthogonalizeError
from ..edits.methods.base import EditMethod
from ..edits.methods.registry import METHODS

MULTIPLIERS = (0.5, 1.0, 2.0)
RANK_WORDS = ("acc99", "acc95")
FIELDS = {"alphas": "alpha", "ranks": "rank", "strengths": "strength"}  # by option, the field of `EditConfig` it sets
OPTIONS = (*FIELDS, "multipliers")


def takes(method: EditMethod, option: str) -> bool:
    """Whether a method is tried at the values of `option`, one of `OPTIONS`.

    The strength of a method that adds would only scale its multipliers.
    """
    if option in ("strengths", "multipliers"):
        return method.adds == (option == "multipliers")
    return FIELDS[option] in method.options


@dataclass(frozen=True)
class SweepGrid:
    """The values that a sweep tries with every method that takes them, in all combinations.

    Attributes:
        strengths: scales of the whole edit, for methods that remove; () is 1.
        alphas: for methods with an alpha; () is each method's own grid.
        ranks: numbers of directions, `acc99` or `acc95`, for methods with a rank; () is each method's own grid.
        multipliers: lengths to add, with both signs, in units of the length of the best mean difference.
        at: a position and layer at which every direction is tried as well as at its finder's best, so that methods can
            be compared like for like; None tries only those.

    Raises:
        OrthogonalizeError: a value is out of range or given twice.
    """

    strengths: Sequence[float] = ()
    alphas: Sequence[float] = ()
    ranks: Sequence[int | str] = ()
    multipliers: Sequence[float] = MULTIPLIERS
    at: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for option in OPTIONS:
            values = getattr(self, option)
            for number, value in enumerate(values):
                if problem := _problem(option, value):
                    raise OrthogonalizeError(f"--{option} {value}: {problem}")
                if value in values[:number]:
                    raise OrthogonalizeError(f"--{option}: {value} is given twice")
        if not self.multipliers:
            raise OrthogonalizeError("--multipliers is empty")

    @classmethod
    def parse(cls, at: str | None = None, **lists: str | None) -> SweepGrid:
        """From comma-separated lists by option, and a position and layer as `P,L`; None keeps the default.

        Raises:
            OrthogonalizeError: a value is not a number, out of range or given twice, or a list is empty.
        """
        values: dict[str, Any] = {}
        for option, text in lists.items():
            if text is None:
                continue
            values[option] = [_value(option, word.strip()) for word in text.split(",") if word.strip()]
            if not values[option]:
                raise OrthogonalizeError(f"--{option} is empty")
        return cls(**values, at=_place(at))

    def check_taken(self, methods: Sequence[EditMethod]) -> None:
        """Check that one of `methods` takes each option that is given.

        Raises:
            OrthogonalizeError: none does.
        """
        for option in OPTIONS:
            default = MULTIPLIERS if option == "multipliers" else ()
            if tuple(getattr(self, option)) == default or any(takes(method, option) for method in methods):
                continue
            takers = [method.name for method in METHODS.values() if takes(method, option)]
            raise OrthogonalizeError(
                f"--{option} belongs to {' and '.join(takers)}, but the sweep tries only "
                f"{' and '.join(method.name for method in methods)}"
            )

    def settings(self, method: EditMethod) -> list[dict[str, Any]]:
        """The fields of `EditConfig` that are tried with `method`: its own grid, where no values are given."""
        given = {
            field: getattr(self, option)
            for option, field in FIELDS.items()
            if getattr(self, option) and takes(method, option)
        }
        own: list[dict[str, Any]] = []
        for entry in method.grid:
            rest = {field: value for field, value in entry.items() if field not in given}
            if rest not in own:
                own.append(rest)
        return [rest | dict(zip(given, values, strict=True)) for values in product(*given.values()) for rest in own]


def _place(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"\s*(-\d{1,5})\s*,\s*(\d{1,5})\s*", text)
    if found is None:
        raise OrthogonalizeError(f"--at {text}: not a position, from the end of the prompt, and a layer, such as -1,12")
    return int(found[1]), int(found[2])


def _value(option: str, word: str) -> float | int | str:
    """A word of the list of `option` as a value."""
    if option == "ranks":
        return int(word) if word.isdecimal() else word
    try:
        return float(word)
    except ValueError:
        raise OrthogonalizeError(f"--{option} {word}: not a number") from None


def _problem(option: str, value: float | int | str) -> str | None:
    """Why `value` cannot be tried; None if it can."""
    if option == "ranks":
        usable = value in RANK_WORDS or (isinstance(value, int) and value > 0)
        return None if usable else f"neither a positive number nor {' or '.join(RANK_WORDS)}"
    if isinstance(value, str) or not math.isfinite(value):
        return "not a finite number"
    if option == "multipliers" and value <= 0:
        return "not a positive number; both signs are tried"
    return "an edit of that size changes nothing" if value == 0 else None
