"""Charts as a page draws them: places in percent of a drawing's width, so that one drawing fits every screen.

A template turns them into inline SVG. Colours and shapes are its classes; every mark says its numbers in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TICKS = 6  # at most about as many as a phone has room for


@dataclass(frozen=True)
class Axis:
    """The values from `low` to `high` along a drawing: linear, or above `linear` logarithmic (the inverse sinh)."""

    low: float
    high: float
    linear: float | None = None

    @classmethod
    def around(cls, values: Iterable[float], linear: float | None = None, least: float = 0.0) -> Axis:
        """The axis that shows 0 and all `values`, and is at least `least` long."""
        shown = [0.0, *(v for v in values if math.isfinite(v))]
        low, high = min(shown), max(shown)
        return cls(low, max(high, low + (least or 1.0)) if high - low <= least else high, linear)

    def place(self, value: float) -> float:
        """The place of a value, in percent of the length; values outside stand at the ends."""
        low, high, here = (self._scaled(v) for v in (self.low, self.high, min(max(value, self.low), self.high)))
        return round(100 * (here - low) / (high - low), 3)

    def _scaled(self, value: float) -> float:
        return value if self.linear is None else math.asinh(value / self.linear)

    def ticks(self, scale: float = 1.0, unit: str = "") -> list[tuple[float, str]]:
        """Places and texts of round values; texts show `scale` times the value."""
        low, high = scale * self.low, scale * self.high
        found = _steps(low, high) if self.linear is None else _decades(low, high, scale * self.linear)
        return [(self.place(v / scale), f"{v:.10g}{unit}") for v in found]


def _steps(low: float, high: float) -> list[float]:
    """At most `TICKS` multiples of 1, 2, 2.5 or 5 times a power of ten between two values."""
    power = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step = next(s * power for s in (1, 2, 2.5, 5, 10, 20) if (high - low) / (s * power) <= TICKS - 1)
    slack = 1e-9 * step  # 0.1 is no sum of powers of two
    return [n * step for n in range(math.ceil((low - slack) / step), math.floor((high + slack) / step) + 1)]


def _decades(low: float, high: float, linear: float) -> list[float]:
    """0 and powers of ten between two values, on both sides of 0, from the first above `linear` on."""
    first = math.ceil(math.log10(linear))
    found = [0.0]
    for side in (1.0, -1.0):
        last = math.floor(math.log10(max(side * high if side > 0 else -low, linear)))
        found += [side * 10.0**power for power in range(first, last + 1)]
    return sorted(v for v in found if low <= v <= high)


@dataclass(frozen=True)
class Mark:
    """One value, or a point of two: its place, its interval, its words, and what is written beside it.

    `kind` names its colour and shape; `key` ties it to a row of a table.
    """

    kind: str
    words: str
    x: float
    y: float = 50.0
    interval: tuple[float, float] | None = None
    label: str = ""
    key: str = ""
    ringed: bool = False


@dataclass(frozen=True)
class Strips:
    """Rows of marks with intervals over one horizontal axis."""

    title: str
    rows: Sequence[tuple[str, Sequence[Mark]]]
    ticks: Sequence[tuple[float, str]]
    legend: Sequence[tuple[str, str]]
    zero: float | None = None


@dataclass(frozen=True)
class Points:
    """Points of two values; `guides` are vertical lines with their names."""

    title: str
    across: str
    up: str
    marks: Sequence[Mark]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    legend: Sequence[tuple[str, str]]
    guides: Sequence[tuple[float, str]] = ()
