"""Rows of text from a report's measures, for the terminal, the model card and the HTML page."""

from __future__ import annotations

from ..data.answer_forms import words
from ..data.benchmarks import PROMPT_SETS
from ..evals.metrics import Divergence, Loss, Measure, Paired, Rate, perplexity_of
from ..evals.suites.answers import CONTRAST_TITLES, FORMS
from ..evals.suites.registry import series_title
from .schema import Report

FORM = "suites.form."
Row = tuple[str, str, str, str]
LEGEND = (
    "[ ]: 95% intervals. Shares: Tango's score interval with McNemar's score test; the rest: one bootstrap for both. "
    "An interval leaves out zero exactly where p < 0.05."
)


def set_title(name: str) -> str:
    """The title of a prompt set."""
    if name in PROMPT_SETS:
        return PROMPT_SETS[name].title
    return CONTRAST_TITLES.get(name, name)


def title(key: str, concept: str = "") -> str:
    """The title of a measure, given its dotted key.

    `concept` is what the run's behaviour is called; refusals are those by wording.
    """
    match key.split("."):
        case ["refusal", *_, name]:
            return f"refusal, {set_title(name)}"
        case ["behaviour", *_, name]:
            return f"{concept or 'behaviour'}, {set_title(name)}"
    declared = series_title(key)
    if declared is not None:
        return declared
    match key.split("."):
        case ["judges", judge, field, *_, name]:
            return f"{field} by {judge}, {set_title(name)}"
        case ["loss", "sets", name]:
            return f"{title('loss.own_completions')}, {set_title(name)}"
        case ["kl", "sets", name, series]:
            return f"{title(f'kl.{series}')}, {set_title(name)}"
        case ["suites", "form", name]:
            of, _, form = name.rpartition(": ")
            return f"{set_title(of)}: {FORMS.get(form, form)}"
        case ["tasks" | "suites", group, name]:
            return f"{group}, {name}"
    return key


def kept_title(key: str, concept: str = "") -> str:
    """The title of the share of the base's behaviour that an edited model keeps."""
    return f"{title(key, concept)}: kept"


def loss_title(key: str) -> str:
    """The title of a loss; lm-eval names tasks by their perplexity, so theirs says that it is not one."""
    return f"{title(key)}: cross-entropy" if key.startswith("tasks.") else title(key)


def value(measure: Measure) -> str:
    """The value with its interval."""
    if isinstance(measure, Rate):
        if not measure.n:
            return "-"
        return f"{100 * measure.value:.1f}% [{100 * measure.ci95[0]:.1f}, {100 * measure.ci95[1]:.1f}]"
    interval = f" [{measure.ci95[0]:.4f}, {measure.ci95[1]:.4f}]" if measure.ci95 else ""
    return f"{measure.value:.4f}{interval}"


def perplexity(loss: Loss) -> str:
    """The perplexity with its interval, both exponentials of the loss's."""
    interval = f" [{perplexity_of(loss.ci95[0]):.3f}, {perplexity_of(loss.ci95[1]):.3f}]" if loss.ci95 else ""
    return f"{loss.perplexity:.3f}{interval}"


def change(measure: Measure, after: Measure, pair: Paired) -> str:
    """The paired difference with its interval and p-value, and its n if some items are missing on either side.

    Interval and test agree (see `evals.intervals`).
    """
    if not pair.n:
        return "no items in common"
    scale, unit, sign = (100, " points", "+.1f") if isinstance(measure, Rate) else (1, "", "+.4f")
    if isinstance(measure, Loss):
        scale, unit, sign = 100, "%", "+.1f"
    text = f"{scale * pair.difference:{sign}}{unit}"
    if pair.ci95:
        text += f" [{scale * pair.ci95[0]:{sign}}, {scale * pair.ci95[1]:{sign}}]"
    if not pair.n == measure.n == after.n:
        text += f" on the {pair.n} items in common"
    if pair.p is not None:
        test = "McNemar " if isinstance(measure, Rate) else ""
        text += f" ({test}p {'<' if pair.p < 0.001 else '='} {max(pair.p, 0.001):.2g})"
    return text


def summary_rows(report: Report, categories: bool = True) -> list[Row]:
    """(measure, base, edited, change) as text; with `categories`, losses by category as well."""
    rows: list[Row] = []
    base, edited = report.base.flat(), report.edited.flat()
    for key, before in base.items():
        after, pair = edited.get(key), report.paired.get(key)
        if after is None or pair is None:
            continue
        name = f"{loss_title(key) if isinstance(before, Loss) else title(key, report.concept)} (n = {before.n})"
        if isinstance(before, Divergence):
            rows.append((name, "0", value(after), "nats per token, at least"))
            continue
        rows.append((name, value(before), value(after), change(before, after, pair)))
        if isinstance(before, Rate) and isinstance(after, Rate) and before.unparseable + after.unparseable:
            rows.append(
                (f"{title(key, report.concept)}: unreadable", str(before.unparseable), str(after.unparseable), "")
            )
        if key in report.kept:
            kept = report.kept[key]
            rows.append(
                (f"{kept_title(key, report.concept)} (n = {kept.n})", "", value(kept), "of what the base shows")
            )
        if isinstance(before, Loss) and isinstance(after, Loss):
            name = title(key) if key.startswith("tasks.") else title(key).replace("cross-entropy", "perplexity")
            rows.append((name, perplexity(before), perplexity(after), ""))
            if categories:
                rows += [
                    (f"{what}: {category} (n = {n})", value(old), value(new), apart)
                    for what, category, n, old, new, apart in _by_category(title(key), before, after, pair)
                ]
    return rows + _empty_rows(report)


def drawn_rates(report: Report) -> dict[str, tuple[Rate, Rate]]:
    """The rates that the figure shows, (base, edited) by dotted key: all that both models have, except answers' forms.

    The forms, six for every set, are left to the table.
    """
    edited = report.edited.flat()
    found = {}
    for key, before in report.base.flat().items():
        after = edited.get(key)
        if isinstance(before, Rate) and isinstance(after, Rate) and before.n and after.n and not key.startswith(FORM):
            found[key] = before, after
    return found


def _empty_rows(report: Report) -> list[Row]:
    """How many answers are empty, by prompt set: they neither refuse nor show a behaviour, and are no success.

    None if there are no such answers, or if suite `form` counts them.
    """
    if "form" in report.suites:
        return []
    rows = []
    for name in dict.fromkeys(each.set for each in report.answers):
        mine = [(not words(each.base), not words(each.edited)) for each in report.answers if each.set == name]
        base, edited = (sum(flags) for flags in zip(*mine, strict=True))
        if base or edited:
            rows.append((f"{set_title(name)}: {FORMS['empty']} (n = {len(mine)})", str(base), str(edited), "answers"))
    return rows


CategoryRow = tuple[str, str, int, Rate | Loss, Rate | Loss, str]


def _by_category(name: str, before: Rate | Loss, after: Rate | Loss, pair: Paired) -> list[CategoryRow]:
    """One row per category that base, edited and comparison have."""
    rows = []
    for category, old in before.by_category.items():
        new, apart = after.by_category.get(category), pair.by_category.get(category)
        if new is not None and apart is not None:
            rows.append((name, category, old.n, old, new, change(old, new, apart)))
    return rows


def category_rows(report: Report) -> list[CategoryRow]:
    """(measure, category, n, base, edited, change) for every measure whose items have categories."""
    rows = []
    edited = report.edited.flat()
    for key, before in report.base.flat().items():
        after, pair = edited.get(key), report.paired.get(key)
        if isinstance(before, Rate | Loss) and isinstance(after, Rate | Loss) and pair is not None:
            rows += _by_category(title(key, report.concept), before, after, pair)
    return rows
