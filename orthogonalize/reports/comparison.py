"""Two reports of `eval` side by side, compared prompt by prompt where their answers allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..evals.metrics import Loss, Measure, Paired, Rate, compare, yes_no_series
from .schema import Report
from .tables import change, kept_title, loss_title, title, value

COLUMNS = ("measure", "base", "first edit", "second edit", "second against first")


def differences(first: Report, second: Report) -> list[str]:
    """What two reports were not measured alike in, so that a difference may come from there."""
    found = []
    for name, words in (
        ("base_model", "the base model"),
        ("engine", "the engine"),
        ("engine_version", "the engine's version"),
        ("max_new_tokens", "the length of answers"),
        ("limit", "the limit of items"),
        ("measure", "the behaviour's measure"),
        ("data", "the data"),
    ):
        if getattr(first, name) != getattr(second, name):
            found.append(words)
    before, after = first.base.flat(), second.base.flat()
    if any(key in after and after[key].value != measure.value for key, measure in before.items()):
        found.append("what the base itself scores")
    return found


def paired_refusals(first: Report, second: Report) -> dict[str, Paired]:
    """By key of the refusal rates, how the second edit's refusals by wording differ from the first's, by prompt.

    Only prompts that both reports hold answers to are compared; a set without any is left out.
    """
    flags = [{(each.set, each.prompt): each.edited_refused for each in report.answers} for report in (first, second)]
    common = [key for key in flags[0] if key in flags[1]]
    found = {}
    for key in first.edited.flat():
        name = key.rpartition(".")[2]
        mine = [each for each in common if each[0] == name]
        if key.startswith("refusal.") and mine:
            series = [yes_no_series([side[each] for each in mine]) for side in flags]
            found[key] = compare(series[0], series[1])
    return found


def comparison_rows(first: Report, second: Report) -> list[tuple[str, ...]]:
    """The rows of the table, as `COLUMNS` names its columns; a measure that one report lacks is left blank there."""
    one, two, base = first.edited.flat(), second.edited.flat(), first.base.flat()
    pairs = paired_refusals(first, second)
    rows = []
    for key in dict.fromkeys([*one, *two]):
        known = one.get(key) or two[key]
        name = loss_title(key) if isinstance(known, Loss) else title(key, first.concept)
        cells = [_value(measures.get(key)) for measures in (base, one, two)]
        apart = change(one[key], two[key], pairs[key]) if key in pairs and key in two else _apart(one, two, key)
        rows.append((name, *cells, apart))
    for key in dict.fromkeys([*first.kept, *second.kept]):
        kept = [_value(report.kept.get(key)) for report in (first, second)]
        rows.append((kept_title(key, first.concept), "", *kept, _apart(first.kept, second.kept, key)))
    return rows


def comparison_document(first: Report, second: Report) -> dict[str, dict[str, Any]]:
    """The numbers of the table by dotted key: base, first and second edit, and what the second is against the first.

    `difference` is None where one report lacks the measure; `paired` has its interval and test where it is by prompt.
    """
    one, two, base = first.edited.flat(), second.edited.flat(), first.base.flat()
    pairs = paired_refusals(first, second)
    found = {}
    for key in dict.fromkeys([*one, *two]):
        sides = {"base": base.get(key), "first": one.get(key), "second": two.get(key)}
        found[key] = {
            "title": title(key, first.concept),
            **{name: None if measure is None else measure.model_dump() for name, measure in sides.items()},
            "difference": two[key].value - one[key].value if key in one and key in two else None,
            "paired": pairs[key].model_dump() if key in pairs else None,
        }
    return found


def _value(measure: Measure | None) -> str:
    return "" if measure is None else f"{value(measure)} (n = {measure.n})"


def _apart(one: Mapping[str, Measure], two: Mapping[str, Measure], key: str) -> str:
    """The plain difference: reports store no items of this measure, so it has no interval."""
    if key not in one or key not in two:
        return ""
    gap = two[key].value - one[key].value
    text = f"{100 * gap:+.1f} points" if isinstance(one[key], Rate) else f"{gap:+.4f}"
    return f"{text} (unpaired)"
