"""What a report's numbers allow one to say, in words: no more than their intervals and tests do."""

from __future__ import annotations

from collections.abc import Callable

from ..evals.metrics import Loss, Paired, Score
from .schema import Report
from .tables import loss_title, set_name, title

ALPHA = 0.05
HARM = 0.05  # an increase of the loss by a twentieth is called a cost


def _moved(pair: Paired) -> bool:
    if pair.p is not None:
        return pair.p < ALPHA
    return pair.ci95 is not None and not pair.ci95[0] <= 0 <= pair.ci95[1]


def _percents(*values: float) -> list[str]:
    """Shares in percent, with so many digits that two which differ look it (and nothing but 0 like 0)."""
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


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _rate_verdict(report: Report, key: str, what: str, forms: Callable[..., list[str]] = _percents) -> str | None:
    before, after = report.base.flat().get(key), report.edited.flat().get(key)
    pair = report.paired.get(key)
    if before is None or after is None or pair is None:
        return None
    if not pair.n:
        return (
            f"{what}: no item could be read of both models ({before.n} of the base's, {after.n} of the edited one's)."
        )
    old, new = forms(before.value, after.value)
    items = _counted(pair.n, "item")
    word = "rose" if pair.difference > 0 else "fell"
    if not pair.n == before.n == after.n:  # the shares are of other items than the difference is
        items = f"the {items} that both have (of {max(before.n, after.n)} read)"
        if _moved(pair):
            return f"{what} {word} by {forms(abs(pair.difference))[0]} on {items}."
        return f"{what}: no change that {items} could show."
    if not _moved(pair):
        return f"{what}: no change that {items} could show ({old} and {new})."
    return f"{what} {word} from {old} to {new} (n = {pair.n})."


def _loss_verdict(report: Report, key: str) -> str | None:
    pair = report.paired.get(key)
    if pair is None:
        return None
    name = loss_title(key)
    name = name[0].upper() + name[1:]
    low, high = pair.ci95 or (0.0, 0.0)
    ends = " to ".join(f"{end:+.1f}%" if abs(end) >= 0.05 else f"{end:+.2g}%" for end in (100 * low, 100 * high))
    interval = f" (95%: {ends})" if pair.ci95 else ""
    if not _moved(pair):  # of five texts no test could find a change, whatever their interval says
        return f"{name}: no change that {_counted(pair.n, 'text')} could show{interval if low <= 0 <= high else ''}."
    size = "more than a twentieth: other abilities may have suffered" if pair.difference > HARM else "little"
    amount = 100 * abs(pair.difference)
    by = f"{amount:.1f}%" if amount >= 0.05 else f"{amount:.2g}%"
    if pair.difference > 0:
        return f"{name} rose by {by}{interval}; that is {size}."
    return f"{name} fell by {by}{interval}."


def _task_verdict(report: Report, key: str) -> str | None:
    match report.base.flat().get(key):
        case Loss():
            return _loss_verdict(report, key)
        case Score():
            return _rate_verdict(report, key, title(key), _numbers)
    return _rate_verdict(report, key, title(key))


def verdicts(report: Report) -> list[str]:
    """One sentence a finding, the most important first."""
    refusal = report.base.refusal
    sets = ["target", "harmless", *(f"sets.{name}" for name in (refusal.sets if refusal else ()))]
    found = [_rate_verdict(report, f"refusal.{key}", f"Refusal on {set_name(key)}") for key in sets]
    if refusal is None or (refusal.target.value < HARM and "behaviour.target" in report.paired):
        found += [
            _rate_verdict(report, f"behaviour.{name}", f"The behaviour's first token on {set_name(name)}")
            for name in ("target", "harmless")
        ]
    for judge in report.base.judges:
        found.append(
            _rate_verdict(report, f"judges.{judge}.harmful.target", f"Harmful answers to target prompts (by {judge})")
        )
    found += [_loss_verdict(report, key) for key in report.paired if key.startswith("loss.")]
    kl = report.edited.kl
    if kl is not None:
        found.append(
            "On harmless prompts the edited model's next words differ from the base's by at least "
            f"{kl.completions.value:.3f} nats a token (KL), {kl.first_token.value:.3f} at the first."
        )
    for key in report.paired:
        if key.startswith(("choices.", "tasks.")) and key.count(".") == 1 + key.startswith("tasks."):
            found.append(_task_verdict(report, key))
    return [sentence for sentence in found if sentence is not None]
