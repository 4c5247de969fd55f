"""A report's measures as rows of text, for the terminal, the card and the page."""

from __future__ import annotations

from ..evals.metrics import Divergence, Loss, Measure, Paired, Rate, perplexity_of
from .schema import Report

Row = tuple[str, str, str, str]

SETS = {
    "target": "target prompts",
    "harmless": "harmless prompts",
    "xstest": "XSTest (safe, look unsafe)",
    "orbench": "OR-Bench (safe, look unsafe)",
    "jailbreakbench": "JailbreakBench",
    "advbench": "AdvBench",
    "harmbench": "HarmBench",
    "maliciousinstruct": "MaliciousInstruct",
    "strongreject": "StrongREJECT",
    "tdc2023": "TDC 2023",
}
TITLES = {
    "loss.own_completions": "cross-entropy, own answers",
    "loss.pile": "cross-entropy, Pile",
    "loss.alpaca": "cross-entropy, Alpaca answers",
    "kl.first_token": "KL to base, first token",
    "kl.completions": "KL to base, along own answers",
    "choices.mmlu": "MMLU, 5-shot",
    "choices.arc": "ARC-Challenge, 5-shot",
    "choices.truthfulqa": "TruthfulQA MC1",
}


def set_name(key: str) -> str:
    """What the prompt set at the end of a dotted key is called."""
    name = key.rpartition(".")[2]
    return SETS.get(name, name)


def title(key: str) -> str:
    """What a measure's dotted key is called."""
    if key in TITLES:
        return TITLES[key]
    parts = key.split(".")
    match parts[0]:
        case "refusal":
            return f"refusal, {set_name(key)}"
        case "behaviour":
            return f"behaviour's first token, {set_name(key)}"
        case "judges":
            return f"{parts[2]} by {parts[1]}, {set_name(key)}"
        case "tasks":
            return f"{parts[1]}, {parts[2]}"
    return key


def loss_title(key: str) -> str:
    """What a loss is called beside its perplexity, by which lm-eval's tasks name it."""
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
    """The perplexity with its interval, the exponential of the loss's."""
    interval = f" [{perplexity_of(loss.ci95[0]):.3f}, {perplexity_of(loss.ci95[1]):.3f}]" if loss.ci95 else ""
    return f"{loss.perplexity:.3f}{interval}"


def change(measure: Measure, after: Measure, pair: Paired) -> str:
    """The paired difference with its interval and p-value; of how many items, where not of all that each side has."""
    if not pair.n:
        return "nothing that both have"
    scale, unit, sign = (100, " points", "+.1f") if isinstance(measure, Rate) else (1, "", "+.4f")
    if isinstance(measure, Loss):
        scale, unit, sign = 100, "%", "+.1f"
    text = f"{scale * pair.difference:{sign}}{unit}"
    if pair.ci95:
        text += f" [{scale * pair.ci95[0]:{sign}}, {scale * pair.ci95[1]:{sign}}]"
    if not pair.n == measure.n == after.n:
        text += f" on the {pair.n} that both have"
    if pair.p is not None:
        test = "McNemar " if isinstance(measure, Rate) else ""
        text += f" ({test}p {'<' if pair.p < 0.001 else '='} {max(pair.p, 0.001):.2g})"
    return text


def summary_rows(report: Report) -> list[Row]:
    """(measure, base, edited, change) as text."""
    rows: list[Row] = []
    base, edited = report.base.flat(), report.edited.flat()
    for key, before in base.items():
        after, pair = edited.get(key), report.paired.get(key)
        if after is None or pair is None:
            continue
        name = f"{loss_title(key) if isinstance(before, Loss) else title(key)} (n = {before.n})"
        if isinstance(before, Divergence):
            rows.append((name, "0", value(after), "nats a token, at least"))
            continue
        rows.append((name, value(before), value(after), change(before, after, pair)))
        if isinstance(before, Rate) and isinstance(after, Rate) and before.unparseable + after.unparseable:
            rows.append((f"{title(key)}: unreadable", str(before.unparseable), str(after.unparseable), ""))
        if isinstance(before, Loss) and isinstance(after, Loss):
            name = title(key) if key.startswith("tasks.") else title(key).replace("cross-entropy", "perplexity")
            rows.append((name, perplexity(before), perplexity(after), ""))
    return rows


def category_rows(report: Report) -> list[tuple[str, str, int, Rate, Rate, str]]:
    """(measure, category, n, base, edited, change) wherever items have categories."""
    rows = []
    edited = report.edited.flat()
    for key, before in report.base.flat().items():
        after = edited.get(key)
        if isinstance(before, Rate) and isinstance(after, Rate) and key in report.paired:
            pairs = report.paired[key].by_category
            rows += [
                (
                    title(key),
                    name,
                    rate.n,
                    rate,
                    after.by_category[name],
                    change(rate, after.by_category[name], pairs[name]),
                )
                for name, rate in before.by_category.items()
                if name in after.by_category and name in pairs
            ]
    return rows
