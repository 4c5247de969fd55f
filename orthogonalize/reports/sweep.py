"""The schema of `sweep.json`, its Pareto front and its table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..edits.config import EditConfig
from ..evals.metrics import Loss, Paired, Rate
from ..evals.suites.registry import has_column
from .schema import Measures, Sparse, load_stored
from .tables import title

MARK = "best trade-off on val prompts"
NONE_REMOVES = "none removes any of the behaviour on val prompts without more harm than the base"
EFFECTS = ("behaviour.target", "refusal.target")  # in the order in which they are taken
SHOWN = 0.05  # the least share of target prompts on which the base must show an effect for it to be taken
Semantics = Literal["weights", "residual"]


class SweepRow(Sparse):
    """One edit's measures and their comparison with the base; `refused` says why there are none.

    `val` is the comparison with the base on the run's val prompts, by which edits are chosen; `kept` is as in a
    report.
    """

    SPARSE = frozenset({"kept"})

    name: str
    choice: EditConfig
    direction: str
    layers: list[int]
    seconds: float = 0.0
    refused: str | None = None
    measures: Measures | None = None
    paired: dict[str, Paired] = Field(default_factory=dict)
    kept: dict[str, Rate] = Field(default_factory=dict)
    val: dict[str, Paired] = Field(default_factory=dict)


class Sweep(Sparse):
    """The contents of `sweep.json`: the base, every edit, and `pareto`, the names of the edits on the Pareto front.

    `concept`, `measure` and `sources` are as in a report.

    That front is chosen on the run's val prompts (`val` holds the base's measures there); all other measures are of
    test prompts. `unmarked` says why nothing could be chosen. `effect` and `harm` are the dotted keys of the front's
    axes: how much of the behaviour is gone, and how much worse the base's own answers (or next tokens) are predicted.
    `restored` is True if the engine held the base's
    weights again at the end, bit for bit, and None for hooks or if that was not checked. `mismatches` says what does
    not belong together, which `--allow-other-base` let pass.
    """

    SPARSE = frozenset({"concept", "measure", "sources"})

    format: Literal[2] = 2
    concept: str = ""
    measure: str = ""
    sources: dict[str, str] = Field(default_factory=dict)
    engine: str
    engine_version: str
    semantics: Semantics
    model: str
    suites: list[str]
    judges: dict[str, str] = Field(default_factory=dict)
    data: dict[str, str]
    max_new_tokens: int
    limit: int | None = None
    sensitive: bool
    effect: str | None
    harm: str | None
    restored: bool | None
    base: Measures
    val: Measures | None
    variants: list[SweepRow]
    pareto: list[str]
    unmarked: str | None
    mismatches: list[str] = Field(default_factory=list)

    def __repr__(self) -> str:
        return f"Sweep({self.model}: {len(self.variants)} edits, {len(self.pareto)} on the Pareto front)"

    __str__ = __repr__


def load_sweep(folder: Path | str) -> Sweep:
    """Read a sweep, given as sweep.json or as the folder that `sweep` wrote.

    Raises:
        OrthogonalizeError: it is missing or damaged.
    """
    return load_stored(Sweep, folder, "sweep", "sweep")


def effect_key(base: Measures) -> str | None:
    """The key of the effect: the run's behaviour if the base shows it on target prompts, else refusals if it does."""
    found = base.flat()
    for key in EFFECTS:
        rate = found.get(key)
        if isinstance(rate, Rate) and rate.value >= SHOWN:
            return key
    return next((key for key in EFFECTS if key in found), None)


def harm_key(base: Measures) -> str | None:
    """The key of the harm: the first of three measures that was taken."""
    return next((k for k in ("loss.own_completions", "kl.completions", "loss.pile") if k in base.flat()), None)


def outcome(sweep: Sweep, paired: Mapping[str, Paired]) -> tuple[float, float] | None:
    """(share of the behaviour that is gone, harm) in the comparisons `paired`; None if either is unknown.

    Harm is the relative increase of the loss, or the KL in nats per token.
    """
    effect, harm = paired.get(sweep.effect or ""), paired.get(sweep.harm or "")
    return None if effect is None or harm is None else (-effect.difference, harm.difference)


def drawn_points(sweep: Sweep) -> dict[str, tuple[tuple[float, float], SweepRow]]:
    """(share of the behaviour that is gone, harm) on test prompts of edits that have both, with their rows, by name."""
    return {row.name: (point, row) for row in sweep.variants if (point := outcome(sweep, row.paired)) is not None}


def pareto(sweep: Sweep) -> list[str]:
    """The names of the edits on the Pareto front on val prompts.

    No other edit removes as much at less harm, or more at no more harm; nor does the unedited base, which removes
    nothing at no harm.
    """
    points = {s.name: p for s in sweep.variants if (p := outcome(sweep, s.val)) is not None}
    rivals = [(0.0, 0.0), *points.values()]
    return [
        name
        for name, (gone, harm) in points.items()
        if gone > 0 and not any(g >= gone and h <= harm and (g, h) != (gone, harm) for g, h in rivals)
    ]


def _columns(sweep: Sweep) -> list[str]:
    """The keys in the table: the effect, the same on harmless prompts, the harm, then all other measures."""
    first = [k for k in (sweep.effect, (sweep.effect or "").replace("target", "harmless"), sweep.harm) if k]
    return first + [k for k in sweep.base.flat() if has_column(k) and not k.endswith(".harmless") and k not in first]


def sweep_rows(sweep: Sweep) -> list[tuple[str, ...]]:
    """(edit, each of `_columns`, note) as text, the base first."""
    rows = []
    keys = _columns(sweep)

    def cells(measures: Measures, paired: Mapping[str, Paired], kept: Mapping[str, Rate]) -> tuple[str, ...]:
        found = measures.flat()
        texts = []
        for key in keys:
            measure = found.get(key)
            if isinstance(measure, Rate):
                unread = f" ({measure.unparseable} unreadable)" if measure.unparseable else ""
                left = f" (kept {100 * kept[key].value:.1f}%)" if key in kept else ""
                texts.append((f"{100 * measure.value:.1f}%" if measure.n else "-") + unread + left)
            elif isinstance(measure, Loss):
                texts.append(f"{measure.value:.3f}" + (f" ({100 * paired[key].difference:+.1f}%)" if paired else ""))
            else:
                texts.append("-" if measure is None else f"{measure.value:.3f}")
        return tuple(texts)

    rows.append(("base", *cells(sweep.base, {}, {}), ""))
    for swept in sweep.variants:
        if swept.measures is None:
            rows.append((swept.name, *("-" for _ in keys), f"not possible: {swept.refused}"))
        else:
            mark = MARK if swept.name in sweep.pareto else ""
            rows.append((swept.name, *cells(swept.measures, swept.paired, swept.kept), mark))
    return rows


def sweep_columns(sweep: Sweep) -> list[str]:
    """The column headings of `sweep_rows`."""
    keys = _columns(sweep)
    return ["edit", *(title(k, sweep.concept) for k in keys), ""]


def sweep_caption(sweep: Sweep) -> str:
    """What the numbers and the marks of the table come from."""
    if sweep.unmarked:
        return f"measured on test prompts; no best trade-off is marked: {sweep.unmarked}"
    return "measured on test prompts; best trade-offs are chosen on val prompts"
