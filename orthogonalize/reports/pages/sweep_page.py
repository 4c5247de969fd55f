"""A sweep as one self-contained HTML page: its front, drawn, and the table of its edits with filters."""

from __future__ import annotations

from pathlib import Path

from ..sweep import MARK, Sweep, drawn_points, sweep_caption, sweep_columns, sweep_rows
from ..tables import LEGEND, title
from .charts import Axis, Mark, Points
from .sealed import write_page

SHAPES = 7  # that the template has; of more methods, some look alike
LINEAR = 0.1  # below this, the axis of harm is linear


def sweep_chart(sweep: Sweep) -> Points | None:
    """The harm of every edit against the share of the behaviour that it removes, on test prompts; None without any."""
    drawn = drawn_points(sweep)
    if not drawn:
        return None
    methods = list(dict.fromkeys(row.choice.method for _, row in drawn.values()))
    kinds = {method: f"m{i % SHAPES}" for i, method in enumerate(methods)}
    x = Axis.around([gone for (gone, _), _ in drawn.values()], least=0.1)
    y = Axis.around([harm for (_, harm), _ in drawn.values()], LINEAR, least=0.01)
    percent = (sweep.harm or "").startswith("loss")
    marks = [Mark("unedited", "base: removes nothing, at no harm", x.place(0.0), 100.0 - y.place(0.0), key="base")]
    for name, ((gone, harm), row) in drawn.items():
        cost = f"{100 * harm:+.1f}%" if percent else f"{harm:.4f} nats per token"
        words = f"{name}: {100 * gone:+.1f} points removed, harm {cost}"
        number = str(sweep.pareto.index(name) + 1) if name in sweep.pareto else ""
        words += f"; {MARK} ({number})" if number else ""
        place = x.place(gone), 100.0 - y.place(harm)
        marks.append(Mark(kinds[row.choice.method], words, *place, label=number, key=name, ringed=bool(number)))
    effect, harm_name = (title(key or "", sweep.concept) for key in (sweep.effect, sweep.harm))
    return Points(
        "What every edit removes, and the harm that it does", f"removed: {effect}, points",
        f"harm: {'relative increase of ' if percent else ''}{harm_name}", marks,
        x.ticks(100), y.ticks(100, "%") if percent else y.ticks(),
        [("unedited", "base"), *((kind, method) for method, kind in kinds.items())],
    )  # fmt: skip


def write_sweep_page(sweep: Sweep, file: Path) -> None:
    """Render `sweep`; everything on the page is from it."""
    made = {row.name: row for row in sweep.variants}
    numbers = {name: place for place, name in enumerate(sweep.pareto, 1)}
    choices = [row.choice for row in sweep.variants]
    write_page(
        "sweep.html.j2",
        file,
        sweep=sweep,
        columns=sweep_columns(sweep),
        rows=sweep_rows(sweep),
        made=made,
        numbers=numbers,
        caption=sweep_caption(sweep),
        legend=LEGEND,
        chart=sweep_chart(sweep),
        methods=list(dict.fromkeys(choice.method for choice in choices)),
        scopes=list(dict.fromkeys(choice.scope for choice in choices)),
    )
