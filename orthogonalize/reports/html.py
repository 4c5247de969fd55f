"""The report as one self-contained HTML page, which needs no network."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from .findings import findings
from .headline import RULES, headline, page_title
from .rate_plot import as_png, base64_of, rates_figure
from .schema import Judged, Report
from .tables import LEGEND, category_rows, set_title, summary_rows
from .templating import templates


def _judged(measured: Judged | None, harmful: bool | None, refusal: bool | None) -> str:
    """A judge's judgement of one answer, in words; `measured` tells which fields the judge fills."""
    parts = []
    if measured is None or measured.harmful is not None:
        parts.append({True: "harmful", False: "not harmful", None: "unreadable"}[harmful])
    if measured is not None and measured.refusal is not None:
        parts.append({True: "refuses", False: "does not refuse", None: "refusal unreadable"}[refusal])
    return ", ".join(parts)


def write_webpage(report: Report, plots: Sequence[Path], file: Path) -> None:
    """Render `report` with the run's `plots` embedded."""
    figure = rates_figure(report)
    page = (
        templates()
        .get_template("report.html.j2")
        .render(
            report=report,
            name=page_title(report),
            tiles=headline(report),
            rules=RULES,
            legend=LEGEND,
            judged=_judged,
            rows=summary_rows(report, categories=False),
            categories=category_rows(report),
            findings=findings(report),
            rates=None if figure is None else base64_of(as_png(figure)),
            images=[(p.stem, base64_of(p.read_bytes())) for p in plots],
            sets=[(name, set_title(name)) for name in dict.fromkeys(a.set for a in report.answers)],
        )
    )
    # The placeholder stands before any text from outside.
    file.write_text(page.replace('content="POLICY"', f'content="{_policy(page)}"', 1), "utf-8")


def _policy(page: str) -> str:
    """A policy that allows the page's own script, style and embedded pictures, and nothing from the network."""
    sources = {"img": ["data:"], "style": _hashes("style", page), "script": _hashes("script", page)}
    allowed = "".join(f"; {kind}-src {' '.join(each)}" for kind, each in sources.items() if each)
    return f"default-src 'none'; base-uri 'none'; form-action 'none'{allowed}"


def _hashes(tag: str, page: str) -> list[str]:
    """The hashes of the page's `tag` elements, as a policy names them; text from outside is escaped, so has none."""
    contents = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return [f"'sha256-{b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in contents]
