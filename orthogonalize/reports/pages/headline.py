"""The first screen of a report: what was removed, what was kept and what it cost, coloured by stated rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...evals.metrics import Loss, Paired, Rate
from ..schema import Report
from ..tables import set_title, title

Grade = Literal["good", "fair", "poor", "none"]
LEFT = (0.10, 0.50)  # of the base's behaviour: at most this is left, by the interval's upper end
MOVED = 0.05  # a share of harmless prompts that changed
KEPT = (0.95, 0.80)  # of the base's behaviour on preserved sets: at least this is kept
COST = (0.02, 0.05)  # relative increase of the loss, by the interval's upper end
RULES = (
    "Green, amber, red. Removed: with 95% confidence at most 10%, at most 50%, or more of target prompts show it; "
    "red as well if nothing detectable changed. Kept: preserved sets keep at least 95%, at least 80%, or less of what "
    "the base shows; on other prompts, no detectable change, one of at most 5 points, or more. Cost: with 95% "
    "confidence the loss on the base's own answers rises by at most 2%, at most 5%, or more. Without colour: not "
    "measured, not shown by the base either, or not a fair comparison."
)


@dataclass(frozen=True)
class Tile:
    """One large number: its label, the number, its interval and n in words, and its grade."""

    label: str
    number: str
    detail: str
    grade: Grade

    @property
    def verdict(self) -> str:
        """The grade in a word, for those who see no colours."""
        return {"good": "good", "fair": "fair", "poor": "poor", "none": "not graded"}[self.grade]


def headline(report: Report) -> list[Tile]:
    """The tiles of a report, by the run's own behaviour measure where there is one, else by refusals."""
    suite = "behaviour" if report.base.behaviour is not None else "refusal"
    what = (report.concept or "behaviour") if suite == "behaviour" else "refusal"
    found = [_removed(report, f"{suite}.target", what), *_kept(report, suite, what), _cost(report)]
    tiles = [tile for tile in found if tile is not None]
    if report.mismatches:
        return [Tile(tile.label, tile.number, tile.detail, "none") for tile in tiles]
    return tiles


def _pair(report: Report, key: str) -> tuple[Rate, Rate, Paired] | None:
    before, after, pair = report.base.flat().get(key), report.edited.flat().get(key), report.paired.get(key)
    if not isinstance(before, Rate) or not isinstance(after, Rate) or pair is None or not (before.n and after.n):
        return None
    return before, after, pair


def _removed(report: Report, key: str, what: str) -> Tile | None:
    found = _pair(report, key)
    if found is None:
        return None
    before, after, pair = found
    detail = f"{_interval(after)}; base {_percent(before.value)}, {_n(before, after)}"
    if pair.difference > 0:
        return Tile(f"{what} on target prompts: rose to", _percent(after.value), detail, "none")
    grade = _at_most(after.ci95[1], LEFT)
    if not _is_certain(pair):
        grade = "poor" if before.value > LEFT[0] else "none"
    return Tile(f"{what} left on target prompts", _percent(after.value), detail, grade)


def _kept(report: Report, suite: str, what: str) -> list[Tile]:
    sets = [
        Tile(
            f"{what} kept on {set_title(key.rpartition('.')[2])}",
            _percent(rate.value),
            f"{_interval(rate)} of what the base shows, n = {rate.n}",
            "good" if rate.value >= KEPT[0] else "fair" if rate.value >= KEPT[1] else "poor",
        )
        for key, rate in report.kept.items()
        if key.startswith(f"{suite}.")
    ]
    found = _pair(report, f"{suite}.harmless")
    if found is None:
        return sets
    before, after, pair = found
    grade: Grade = "good" if not _is_certain(pair) else "fair" if abs(pair.difference) <= MOVED else "poor"
    detail = f"{_percent(before.value)} to {_percent(after.value)}, {_n(before, after)}"
    return [Tile(f"{what} on other prompts", f"{100 * pair.difference:+.1f} points", detail, grade), *sets]


def _cost(report: Report) -> Tile | None:
    key = "loss.own_completions"
    pair, before = report.paired.get(key), report.base.flat().get(key)
    if pair is None or not pair.n or not isinstance(before, Loss):
        return None
    label = f"cost: {title(key)}"
    if pair.ci95 is None:
        return Tile(label, f"{100 * pair.difference:+.1f}%", f"no interval, n = {pair.n}", "none")
    low, high = pair.ci95
    detail = f"95%: {100 * low:+.1f}% to {100 * high:+.1f}%, n = {pair.n}"
    return Tile(label, f"{100 * pair.difference:+.1f}%", detail, _at_most(high, COST))


def _at_most(value: float, bounds: tuple[float, float]) -> Grade:
    return "good" if value <= bounds[0] else "fair" if value <= bounds[1] else "poor"


def _is_certain(pair: Paired) -> bool:
    if pair.p is not None:
        return pair.p < 0.05
    return pair.ci95 is not None and not pair.ci95[0] <= 0 <= pair.ci95[1]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _interval(rate: Rate) -> str:
    return f"95%: {_percent(rate.ci95[0])} to {_percent(rate.ci95[1])}"


def _n(before: Rate, after: Rate) -> str:
    return f"n = {before.n}" if before.n == after.n else f"n = {before.n} and {after.n}"


def page_title(report: Report) -> str:
    """The model's name: the checkpoint's, or the base's where that is no name but a folder called after the command."""
    if report.checkpoint.lower() in {"edited", "out", "merged", "adapter", "checkpoint"}:
        return f"{report.base_model}, edited"
    return report.checkpoint
