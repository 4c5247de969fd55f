"""The tables of runs, reports and sweeps as pandas frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..core.errors import OrthogonalizeError
from ..selection.run_folder import Run
from .schema import Report
from .sweep import Sweep, outcome
from .tables import title

if TYPE_CHECKING:
    import pandas

Rows = Iterable[Mapping[str, Any]]


def frame(source: Run | Report | Sweep, table: str | None = None) -> pandas.DataFrame:
    """A table of a run, a report or a sweep.

    Args:
        table: of a run `trials` (the default; with numbers for `edit --pick`), `candidates`, `probes` or `prompts`;
            of a report `measures` (the default; base beside edited, with 95% intervals and the paired difference) or
            `answers`; of a sweep `edits`. Shares are between 0 and 1, KL in nats per token.

    Raises:
        OrthogonalizeError: there is no such table.
    """
    import pandas

    tables = _tables(source)
    name = table or next(iter(tables))
    if name not in tables:
        raise OrthogonalizeError(f"no table {name!r}; there are {', '.join(tables)}")
    return pandas.DataFrame(tables[name]())


def _tables(source: Run | Report | Sweep) -> dict[str, Callable[[], Rows]]:
    if isinstance(source, Run):
        return {
            "trials": lambda: _trials(source),
            "candidates": lambda: [each.row() for each in source.candidates],
            "probes": lambda: [each.model_dump() for each in source.probes],
            "prompts": lambda: [asdict(each) for each in source.prompts],
        }
    if isinstance(source, Report):
        return {
            "measures": lambda: _measures(source),
            "answers": lambda: [each.model_dump() for each in source.answers],
        }
    return {"edits": lambda: _edits(source)}


def _trials(run: Run) -> Rows:
    numbers = {trial.choice: number for number, trial in enumerate(run.shortlist, 1)}
    return [
        {"pick": numbers.get(each.choice), "edit": each.choice.describe()}
        | each.model_dump(include={"left", "kl", "first_kl", "ce_increase", "confirmed", "degenerate"})
        for each in run.trials
    ]


def _measures(report: Report) -> Rows:
    base, edited = report.base.flat(), report.edited.flat()
    for key, before in base.items():
        after, pair = edited.get(key), report.paired.get(key)
        row: dict[str, Any] = {"key": key, "measure": title(key, report.concept), "n": before.n}
        for model, measure in (("base", before), ("edited", after)):
            low, high = (None, None) if measure is None or measure.ci95 is None else measure.ci95
            row |= {model: None if measure is None else measure.value, f"{model}_low": low, f"{model}_high": high}
        row |= {"difference": None if pair is None else pair.difference, "p": None if pair is None else pair.p}
        yield row


def _edits(sweep: Sweep) -> Rows:
    for row in sweep.variants:
        removed, harm = outcome(sweep, row.paired) or (None, None)
        yield {
            "edit": row.name, "method": row.choice.method, "scope": row.choice.scope, "removed": removed, "harm": harm,
            "pareto": row.name in sweep.pareto, "refused": row.refused, "seconds": row.seconds,
        }  # fmt: skip
