"""The report as one self-contained HTML page: no network, works from disk."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .report import Loss, Rate, Report


def templates() -> Environment:
    """The package's templates; HTML is escaped, a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("orthogonalize"),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda x: f"{100 * x:.1f}%"
    return environment


def summary_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """(measure, base, edited, change) as text, for tables anywhere."""

    def rate(r: Rate) -> str:
        return f"{100 * r.value:.1f}% [{100 * r.ci95[0]:.1f}, {100 * r.ci95[1]:.1f}]"

    def loss(x: Loss) -> str:
        return f"{x.value:.4f}" + (f" [{x.ci95[0]:.4f}, {x.ci95[1]:.4f}]" if x.ci95 else "")

    rows = []
    base, edited, paired = report.base, report.edited, report.paired
    if base.refusal and edited.refusal:
        for name, title in (("target", "refusal, target prompts"), ("harmless", "refusal, harmless prompts")):
            before, after = getattr(base.refusal, name), getattr(edited.refusal, name)
            pair = paired[f"refusal.{name}"]
            change = f"{100 * pair.difference:+.1f} points (McNemar p = {pair.p:.2g})"
            rows.append((f"{title} (n = {before.n})", rate(before), rate(after), change))
    if base.loss and edited.loss:
        old, new = base.loss.own_completions, edited.loss.own_completions
        pair = paired["loss.own_completions"]
        change = f"{100 * pair.difference:+.1f}%"
        if pair.ci95:
            change += f" [{100 * pair.ci95[0]:+.1f}, {100 * pair.ci95[1]:+.1f}]"
        rows.append((f"cross-entropy, own answers (n = {old.n})", loss(old), loss(new), change))
        rows.append(("perplexity, own answers", f"{old.perplexity:.3f}", f"{new.perplexity:.3f}", ""))
    return rows


def write_webpage(report: Report, plots: Sequence[Path], file: Path) -> None:
    """Render `report` with the run's `plots` embedded."""
    images = [(p.stem, base64.b64encode(p.read_bytes()).decode()) for p in plots]
    page = templates().get_template("report.html.j2").render(report=report, rows=summary_rows(report), images=images)
    file.write_text(page, "utf-8")
