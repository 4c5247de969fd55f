"""A report's findings as sentences, which claim no more than the intervals and tests support."""

from __future__ import annotations

from collections.abc import Callable

from ..core.words import counted
from ..evals.metrics import Divergence, Loss, Paired, Score
from ..evals.suites.answers import CONTRAST
from .schema import Rates, Report
from .tables import FORM, loss_title, set_title, title

ALPHA = 0.05
HARM = 0.05  # a relative increase of a loss that the findings warn about


def _is_significant(pair: Paired) -> bool:
    if pair.p is not None:
        return pair.p < ALPHA
    return pair.ci95 is not None and not pair.ci95[0] <= 0 <= pair.ci95[1]


def _percents(*values: float) -> list[str]:
    """Shares in percent, with enough digits that different values look different and only 0 looks like 0."""
    for digits in range(12):
        texts = [f"{100 * value:.{digits}f}" for value in values]
        if len(set(texts)) == len(set(values)) and all(float(t) or not v for t, v in zip(texts, values, strict=True)):
            break
    return [f"{text}%" for text in texts]


def _numbers(*values: float) -> list[str]:
    return (
        [f"{value:.4g}" for value in values]
        if len({f"{v:.4g}" for v in values}) == len(set(values))
        else [f"{value:.10g}" for value in values]
    )


def _rate_finding(report: Report, key: str, what: str, forms: Callable[..., list[str]] = _percents) -> str | None:
    before, after = report.base.flat().get(key), report.edited.flat().get(key)
    pair = report.paired.get(key)
    if before is None or after is None or pair is None:
        return None
    if not pair.n:
        return f"{what}: no item was readable for both models (base {before.n}, edited {after.n})."
    old, new = forms(before.value, after.value)
    items = counted(pair.n, "item")
    word = "rose" if pair.difference > 0 else "fell"
    if not pair.n == before.n == after.n:  # the shares and the difference are over different items
        items = f"the {items} in common (of {max(before.n, after.n)} readable)"
        if _is_significant(pair):
            return f"{what} {word} by {forms(abs(pair.difference))[0]} on {items}."
        return f"{what}: no detectable change on {items}."
    if not _is_significant(pair):
        return f"{what}: no detectable change on {items} ({old} and {new})."
    return f"{what} {word} from {old} to {new} (n = {pair.n})."


def _loss_finding(report: Report, key: str) -> str | None:
    pair = report.paired.get(key)
    if pair is None:
        return None
    name = loss_title(key)
    name = name[0].upper() + name[1:]
    low, high = pair.ci95 or (0.0, 0.0)
    ends = " to ".join(f"{end:+.1f}%" if abs(end) >= 0.05 else f"{end:+.2g}%" for end in (100 * low, 100 * high))
    interval = f" (95%: {ends})" if pair.ci95 else ""
    if not _is_significant(pair):  # five texts are too few for the test, whatever their interval says
        return f"{name}: no detectable change on {counted(pair.n, 'text')}{interval if low <= 0 <= high else ''}."
    size = (
        "; that is more than 5%, so other abilities may have suffered"
        if pair.difference > HARM
        else ", a small increase"
    )
    amount = 100 * abs(pair.difference)
    by = f"{amount:.1f}%" if amount >= 0.05 else f"{amount:.2g}%"
    if pair.difference > 0:
        return f"{name} rose by {by}{interval}{size}."
    return f"{name} fell by {by}{interval}."


def _kept_finding(report: Report, key: str) -> str:
    rate, name = report.kept[key], set_title(key.rpartition(".")[2])
    share, low, high = _percents(rate.value, *rate.ci95)
    what = "refusals" if key.startswith("refusal.") else report.concept or "behaviour"
    return f"Of the base's {what} on {name}, the edited model keeps {share} (n = {rate.n}, 95%: {low} to {high})."


def _finding(report: Report, key: str) -> str | None:
    match report.edited.flat().get(key):
        case Loss():
            return _loss_finding(report, key)
        case Divergence() as found:
            return f"{title(key)}: {found.value:.3f} nats per token."
        case Score():
            return _rate_finding(report, key, title(key), _numbers)
    return _rate_finding(report, key, title(key))


def _effect_findings(report: Report, suite: str, what: str, rates: Rates | None) -> list[str | None]:
    """What became of the behaviour on every prompt set; of preserved sets, also how much of it is kept."""
    found: list[str | None] = []
    for name in [*CONTRAST, *(rates.sets if rates else ())]:
        key = f"{suite}.{name}" if name in CONTRAST else f"{suite}.sets.{name}"
        found.append(_rate_finding(report, key, f"{what} on {set_title(name)}"))
        if key in report.kept:
            found.append(_kept_finding(report, key))
    return found


def findings(report: Report) -> list[str]:
    """One sentence per finding, the most important first."""
    found: list[str | None] = []
    if report.base.behaviour is not None:
        name = report.concept or "the behaviour"
        found += _effect_findings(report, "behaviour", name[0].upper() + name[1:], report.base.behaviour)
    found += _effect_findings(report, "refusal", "Refusal", report.base.refusal)
    for judge in report.base.judges:
        found.append(
            _rate_finding(report, f"judges.{judge}.harmful.target", f"Harmful answers to target prompts (by {judge})")
        )
    found += [_loss_finding(report, key) for key in report.paired if key.startswith("loss.")]
    kl = report.edited.kl
    if kl is not None:
        found.append(
            "On harmless prompts the edited model's next-token distribution differs from the base's by at least "
            f"{kl.completions.value:.3f} nats per token (KL), {kl.first_token.value:.3f} at the first."
        )
        found += [
            f"On {set_title(name)} it differs by at least {each.completions.value:.3f} nats per token, "
            f"{each.first_token.value:.3f} at the first."
            for name, each in kl.sets.items()
        ]
    others = [key for key in report.paired if key.startswith(("choices.", "tasks.", "suites."))]
    # Every set has six forms of answers, so only those that changed are worth a sentence.
    found += [_finding(report, k) for k in others if not k.startswith(FORM) or _is_significant(report.paired[k])]
    return [sentence for sentence in found if sentence is not None]
