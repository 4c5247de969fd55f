"""The charts of a report: its shares, what its losses cost, and the search that its edit comes from."""

from __future__ import annotations

from collections.abc import Callable

from ...evals.metrics import Loss, Paired, Rate
from ..schema import Report
from ..searched import Search, Tried
from ..tables import drawn_rates, loss_title, title
from .charts import Axis, Mark, Points, Strips

ROOM = 0.01  # relative; an axis of losses shows at least one percent
KL_LINEAR, LEFT_LINEAR = 1e-3, 1e-3  # below these, the axes of the search are linear


def rate_chart(report: Report) -> Strips | None:
    """Every share with its interval, base above edited; None if there are none."""
    axis = Axis(0.0, 1.0)

    def mark(model: str, rate: Rate) -> Mark:
        low, high = (axis.place(end) for end in rate.ci95)
        words = (
            f"{model}: {_percent(rate.value)}, 95%: {_percent(rate.ci95[0])} to {_percent(rate.ci95[1])}, n = {rate.n}"
        )
        return Mark(model, words, axis.place(rate.value), 30.0 if model == "base" else 70.0, (low, high))

    rows = [
        (title(key, report.concept), [mark("base", before), mark("edited", after)])
        for key, (before, after) in drawn_rates(report).items()
    ]
    if not rows:
        return None
    return Strips("Shares of prompts", rows, axis.ticks(100, "%"), [("base", "base"), ("edited", "edited")])


def cost_chart(report: Report) -> Strips | None:
    """The relative change of every loss with its interval; None if there are none."""
    base = report.base.flat()
    pairs = {key: pair for key, pair in report.paired.items() if isinstance(base.get(key), Loss) and pair.n}
    if not pairs:
        return None
    ends = [end for pair in pairs.values() for end in (pair.difference, *(pair.ci95 or ()))]
    axis = Axis.around(ends, least=ROOM)

    def mark(pair: Paired) -> Mark:
        within = "" if pair.ci95 is None else f", 95%: {_signed(pair.ci95[0])} to {_signed(pair.ci95[1])}"
        between = None if pair.ci95 is None else (axis.place(pair.ci95[0]), axis.place(pair.ci95[1]))
        return Mark(
            "edited", f"{_signed(pair.difference)}{within}, n = {pair.n}", axis.place(pair.difference), 50.0, between
        )

    rows = [(loss_title(key), [mark(pair)]) for key, pair in pairs.items()]
    legend = [("edited", "edited against base")]
    return Strips("What it cost: relative change of losses", rows, axis.ticks(100, "%"), legend, axis.place(0.0))


def search_chart(search: Search | None) -> Points | None:
    """The KL of every tried edit against the behaviour that it leaves, and where this one is; None without a search."""
    if search is None:
        return None
    x = Axis.around([search.before, *(each.left for each in search.tried)], LEFT_LINEAR)
    y = Axis.around((each.kl for each in search.tried), KL_LINEAR, least=KL_LINEAR)
    unedited = Mark("unedited", f"unedited: {_percent(search.before)} left", x.place(search.before), 100.0)
    marks = [_tried_mark(each, x.place, y.place) for each in sorted(search.tried, key=_is_behind)]
    legend = [("tried", "tried"), ("front", "to choose from (edit --pick N)"), ("unedited", "unedited")]
    if any(each.chosen for each in search.tried):
        legend.insert(2, ("chosen", "this edit"))
    guide = (x.place(search.allowed), f"{100 * search.allowed:g}%")
    return Points(
        "The search: what edits leave, and what they cost", "left to change, % of val prompts",
        "KL, nats per token", [unedited, *marks], x.ticks(100), y.ticks(), legend, [guide],
    )  # fmt: skip


def _is_behind(tried: Tried) -> tuple[bool, bool]:
    """What is drawn first, so that it covers nothing that matters more."""
    return tried.chosen, tried.pick is not None


def _tried_mark(tried: Tried, x: Callable[[float], float], y: Callable[[float], float]) -> Mark:
    kind = "chosen" if tried.chosen else "tried" if tried.pick is None else "front"
    number = "" if tried.pick is None else str(tried.pick)
    said = ["this edit"] if tried.chosen else []
    said += [f"--pick {number}"] if number else []
    words = f"{tried.edit}: {_percent(tried.left)} left, KL {tried.kl:.4f}" + "".join(f"; {each}" for each in said)
    return Mark(kind, words, x(tried.left), 100.0 - y(tried.kl), label=number)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}%"
