"""The report as one self-contained HTML page, which needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..findings import findings
from ..schema import Answer, Judged, Report
from ..tables import LEGEND, category_rows, set_title, summary_rows
from .headline import RULES, headline, page_title
from .report_charts import cost_chart, rate_chart, search_chart
from .sealed import write_page

AT_ONCE = 300  # answers that a browser lays out at a time; the others wait as text until they are scrolled to


def _judged(measured: Judged | None, harmful: bool | None, refusal: bool | None, evasion: bool | None) -> str:
    """A judge's judgement of one answer, in words; `measured` tells which fields the judge fills."""
    parts = []
    if measured is None or measured.harmful is not None:
        parts.append({True: "harmful", False: "not harmful", None: "unreadable"}[harmful])
    if measured is not None and measured.refusal is not None:
        parts.append({True: "refuses", False: "does not refuse", None: "refusal unreadable"}[refusal])
    if measured is not None and measured.evasion is not None:
        parts.append({True: "evades", False: "does not evade", None: "evasion unreadable"}[evasion])
    return ", ".join(parts)


def _judgements(report: Report, answer: Answer, side: Literal["base", "edited"]) -> list[str]:
    """What every judge says of one side's answer, in words."""
    found = []
    for name, said in answer.judges.items():
        fields = (getattr(said, f"{side}_{field}") for field in ("harmful", "refusal", "evasion"))
        found.append(f"{name}: {_judged(report.base.judges.get(name), *fields)}")
    return found


def _flags(before: bool | None, after: bool | None) -> str:
    """What base and edited show, as the page's script reads it."""
    return "".join({True: "1", False: "0", None: "-"}[each] for each in (before, after))


def _became(before: bool | None, after: bool | None, what: str) -> str:
    """What became of the behaviour `what` in an answer, in words; nothing where that is not known."""
    words = {"10": f"{what} gone", "01": f"new {what}", "11": f"{what} in both", "00": f"no {what}"}
    return words.get(_flags(before, after), "")


def _tags(answer: Answer, concept: str) -> list[str]:
    """Category, what became of the run's own behaviour, and what of refusals by wording."""
    refusal = _became(answer.base_refused, answer.edited_refused, "refusal")
    own = _became(answer.base_shows, answer.edited_shows, concept)
    if own and (answer.base_refused or answer.edited_refused) and refusal != own:
        return [tag for tag in (answer.category, own, refusal) if tag]
    return [tag for tag in (answer.category, own or refusal) if tag]


def write_webpage(report: Report, file: Path) -> None:
    """Render `report`; everything on the page is from it."""
    write_page(
        "report.html.j2",
        file,
        report=report,
        name=page_title(report),
        tiles=headline(report),
        rules=RULES,
        legend=LEGEND,
        concept=report.concept or "behaviour",
        shows=any(_flags(a.base_shows, a.edited_shows) != "--" for a in report.answers),
        judgements=_judgements,
        flags=_flags,
        at_once=AT_ONCE,
        tags=_tags,
        rows=summary_rows(report, categories=False),
        categories=category_rows(report),
        findings=findings(report),
        charts=[chart for chart in (rate_chart(report), cost_chart(report)) if chart is not None],
        search=search_chart(report.search),
        sets=[(name, set_title(name)) for name in dict.fromkeys(a.set for a in report.answers)],
        kinds=list(dict.fromkeys(a.category for a in report.answers if a.category)),
    )
