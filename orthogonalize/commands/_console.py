"""The tables that the command line prints."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from ..core.errors import shown

console = Console()
if not console.is_terminal:  # a file or a pipe has no width; COLUMNS may be inherited from any terminal before it
    console = Console(width=400)
LONGEST = 1000  # characters of a cell


def escape(text: object) -> str:
    """Text for a table that may come from a file: one visible line, in which no markup counts."""
    return escape_markup(shown(text, LONGEST))


SCORES = (
    "Mean scores of val prompts at their first token, with each direction edited at its own layer. bypass: of the "
    "positive prompts, with it edited out; lower is better. induce: of the negative ones, with it added; "
    "above 0 they are like the positive ones. KL: how far the negative ones move with it edited out, in nats. "
    "Intervals are 95%, over the prompts; all finders are scored by the same ones."
)


def _mean(value: float | None, ci95: tuple[float, float] | None, digits: int = 2) -> str:
    """A mean with its interval, if it has one; "" of none."""
    if value is None:
        return ""
    shown_value = f"{value:.{digits}f}"
    return shown_value if ci95 is None else f"{shown_value} [{ci95[0]:.{digits}f}, {ci95[1]:.{digits}f}]"


def show_candidates(candidates: Sequence[Any], info: Any, most: int = 3) -> None:
    """The best candidates of every finder, below the scores of the unedited model."""
    table = Table(title="best directions (edited out at their own layer)", caption=SCORES)
    names = ("finder", "position", "layer", "bypass", "induce", "KL", "everywhere: bypass", "KL", "filters")
    everywhere = any(c.global_bypass is not None for c in candidates)
    for i, name in enumerate(names):
        if everywhere or i not in (6, 7):
            table.add_column(name, justify="left" if name in ("finder", "filters") else "right")
    unedited = [_mean(info.base_score.get(side), info.base_score_ci95.get(side)) for side in ("positive", "negative")]
    table.add_row("none (unedited)", "", "", *unedited, "0.000", *([unedited[0], "0.000"] if everywhere else []), "")
    for finder in dict.fromkeys(c.finder for c in candidates):
        mine = [c for c in candidates if c.finder == finder]
        place = (candidates[0].position, candidates[0].layer)  # of the first finder's best, to compare all at
        for c in [*mine[:most], *(c for c in mine[most:] if (c.position, c.layer) == place)]:
            numbers = [_mean(c.bypass, c.bypass_ci95), _mean(c.induce, c.induce_ci95), _mean(c.kl, c.kl_ci95, 3)]
            if everywhere:
                numbers += ["", ""] if c.global_bypass is None else [f"{c.global_bypass:.2f}", f"{c.global_kl:.3f}"]
            filters = escape(", ".join(c.failed) or "passes")
            table.add_row(escape(finder), escape(info.position_name(c.position)), str(c.layer), *numbers, filters)
    console.print(table)


PROBED = (
    "Its accuracy with 95% intervals, before and after the edit. Every finder at its own best place, and at the first "
    "finder's, where they can be compared."
)


def _accuracy(share: float, count: int) -> str:
    from ..evals.intervals import proportion_interval

    low, high = proportion_interval(round(share * count), count)
    return f"{100 * share:.0f}% [{100 * low:.0f}, {100 * high:.0f}]"


def show_run(run: Any) -> None:
    """The probes of a run, and the tried edits to choose from with `edit --pick`."""
    if run.probes:
        table = Table(title=f"a fresh linear probe on {run.probes[0].n} val prompts", caption=PROBED)
        for name in ("method", "rank", "position", "layer", "before", "after", "chance"):
            table.add_column(name, justify="left" if name in ("method", "position") else "right")
        for p in run.probes:
            place = escape(run.info.position_name(p.position)), str(p.layer)
            shares = _accuracy(p.before, p.n), _accuracy(p.after, p.n), f"{100 * p.chance:.0f}%"
            table.add_row(escape(p.method), str(p.rank), *place, *shares)
        console.print(table)
    if run.trials:
        _show_shortlist(run.shortlist, run.info.nothing_chosen is None)


def _show_shortlist(trials: Sequence[Any], chosen: bool) -> None:
    """The best edit and the rest of the Pareto front, numbered as `edit --pick` takes them."""
    preserved = list(trials[0].preserved)
    default = "1 is the default" if chosen else "none was chosen"
    table = Table(title=f"{len(trials)} edits to choose from: edit --pick N ({default})")
    table.add_column("N", justify="right")
    table.add_column("edit")
    numbers = ("behaviour left", "in answers", "degenerate answers", "KL, nats per token", "KL, first token")
    kept = [heading for name in preserved for heading in (f"KL, {name}", f"behaviour changed, {name}")]
    for name in (*numbers, *kept, "cross-entropy"):
        table.add_column(escape(name), justify="right")
    loops = _share(next((t.degenerate_before for t in trials if t.degenerate_before is not None), None))
    same = ["0.0000", "0.0000", *["0.0000", "0.0%"] * len(preserved), "+0.0%"]
    unedited = [f"{100 * trials[0].before:.1f}%", "", loops, *same]
    table.add_row("", "none (the unedited model)", *unedited)
    for number, t in enumerate(trials, 1):
        moved = [cell for name in preserved for cell in (f"{t.preserved[name]:.4f}", f"{100 * t.flipped[name]:.1f}%")]
        answers = [_share(t.confirmed), _share(t.degenerate)]
        cells = [f"{100 * t.left:.1f}%", *answers, f"{t.kl:.4f}", f"{t.first_kl:.4f}", *moved]
        table.add_row(str(number), escape(t.choice.describe()), *cells, f"{100 * t.ce_increase:+.1f}%")
    console.print(table)


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def show_sweep(sweep: Any) -> None:
    """The edits of a sweep, one per row."""
    from ..reports.sweep import sweep_caption, sweep_columns, sweep_rows

    _show_mismatches(sweep.mismatches)

    table = Table(title=escape(f"{sweep.model} ({sweep.engine_version})"), caption=escape(sweep_caption(sweep)))
    for i, name in enumerate(sweep_columns(sweep)):
        table.add_column(name, no_wrap=i == 0, overflow="fold")
    for row in sweep_rows(sweep):
        table.add_row(*map(escape, row))
    console.print(table)


def show_findings(findings: Sequence[Any]) -> None:
    """What `doctor` found, one thing per row."""
    table = Table(title="this machine")
    for name in ("", "found", "state", "what to do"):
        table.add_column(name, overflow="fold")
    for each in findings:
        table.add_row(*map(escape, (each.name, each.found, each.state, each.advice)))
    console.print(table)


def show_judged(judged: Any) -> None:
    """The rates that a judge found, in total and by category; for a report, those of both models."""
    if hasattr(judged, "edited"):
        for name in ("base", "edited"):
            _show_judged_model(getattr(judged, name), f"{name}: ")
    else:
        _show_judged_model(judged)


def _show_judged_model(judged: Any, prefix: str = "") -> None:
    from ..reports.tables import value

    table = Table(title=escape(f"{prefix}{judged.n} answers, judged by {judged.model or judged.judge}"))
    for column in ("", "share", "n", "unreadable"):
        table.add_column(column)
    for field, rate in (("refusal", judged.refusal), ("evasion", judged.evasion), ("harmful", judged.harmful)):
        if rate is None:
            continue
        for label, part in [(field, rate), *((f"  {c}", r) for c, r in rate.by_category.items())]:
            table.add_row(escape(label), escape(value(part)), str(part.n), str(part.unparseable))
    console.print(table)


def show_comparison(comparison: Any) -> None:
    """Two reports side by side, and what they were not measured alike in."""
    from ..reports.comparison import COLUMNS

    table = Table(title=escape(f"{comparison.first.checkpoint} and {comparison.second.checkpoint}"))
    for name in COLUMNS:
        table.add_column(name)
    for row in comparison.rows:
        table.add_row(*map(escape, row))
    console.print(table)
    if comparison.unlike:
        console.print(
            escape(f"not measured alike: {', '.join(comparison.unlike)}; differences may come from there"),
            soft_wrap=True,
        )


def _show_mismatches(mismatches: Sequence[str]) -> None:
    """What does not belong together, before anything else."""
    for each in mismatches:
        console.print(escape(f"not a fair comparison: {each}"), style="bold", soft_wrap=True)


def show_report(report: Any) -> None:
    """The measures of base and edited, and how they differ."""
    from ..reports.tables import LEGEND, summary_rows

    _show_mismatches(report.mismatches)

    table = Table(title=escape(f"base against edited ({report.engine_version})"), caption=LEGEND)
    for name in ("measure", "base", "edited", "change"):
        table.add_column(name)
    for row in summary_rows(report):
        table.add_row(*map(escape, row))
    console.print(table)


FOUND = (
    "change: |W' - W| / |W|. rank: of W' - W, without what rounding explains. energy: the share of the change that "
    "this rank holds. left: the share of the component along the common directions that is still there, 0 after a "
    "projection. strength: how much of it was taken out, 1 by a projection, 2 by a reflection. Empty: not changed "
    "along common directions."
)
PLANNED = (
    "change: |W' - W| / |W|. rank: of the recipe's map. leak: the share of the planned change along that map that is "
    "missing in the stored weights. strength: how much of the component along it was taken out, 1 by a projection, "
    "2 by a reflection; empty where a constant was added."
)


def show_differences(audit: Any, most: int = 16) -> None:
    """The changed tensors: with a recipe, along its own maps; otherwise along the directions that changes share.

    Only the first `most` are shown.
    """
    planned = getattr(audit, "edit", None) is not None
    names = ("change", "rank", "leak", "strength") if planned else ("change", "rank", "energy", "left", "strength")
    table = Table(title="changed tensors", caption=PLANNED if planned else FOUND)
    table.add_column("tensor", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    rows = _planned_rows(audit) if planned else _found_rows(audit)
    for row in rows[:most]:
        table.add_row(*map(escape, row))
    if len(rows) > most:
        table.add_row(f"and {len(rows) - most} more", *[""] * len(names))
    console.print(table)


def _found_rows(audit: Any) -> list[tuple[str, ...]]:
    rows = []
    for name, change in audit.changed.items():
        found = audit.differences.get(name)
        best = audit.along_common(name)
        rank = "" if found is None else "full" if found.rank is None else str(found.rank)
        cells = [f"{best.left:.1e}", f"{best.strength:.2f}"] if best else ["", ""]
        rows.append((name, f"{change:.2e}", rank, f"{found.energy:.0%}" if found else "", *cells))
    return rows


def _planned_rows(audit: Any) -> list[tuple[str, ...]]:
    rows, check = [], getattr(audit, "quantization", None)
    only_quantized = set() if check is None else check.quantized
    for name in dict.fromkeys([*audit.leaks, *audit.changed]):
        leak = audit.leaks.get(name)
        cells = ["", "only quantised" if name in only_quantized else "not in the recipe", ""]
        if leak is not None:
            cells = [
                str(leak.rank),
                "" if leak.leak is None else f"{leak.leak:.1e}",
                "" if leak.strength is None else f"{leak.strength:.2f}",
            ]
        rows.append((name, f"{audit.changed[name]:.2e}" if name in audit.changed else "added", *cells))
    return rows


def _setting(value: Any) -> str:
    """A value of a configuration; of a quantization_config, which lists many layers, the method and format."""
    if isinstance(value, dict) and "quant_method" in value:
        return " ".join(str(value[key]) for key in ("quant_method", "format") if value.get(key))
    return repr(value)


def _quantization_rows(cost: Any) -> list[tuple[str, str]]:
    rows = [
        ("lost by quantisation", f"{cost.leak:.1e} of the edit's planned change, over all quantised matrices"),
        ("stored weights from the unquantised edit", f"{cost.error:.2%} of their norm"),
    ]
    if cost.against_plain is not None:
        rows.append(("that, by plain quantisation of the base", f"{cost.error / cost.against_plain:.2%}"))
    return rows


def show_audit(audit: Any) -> None:
    """The result of `verify`."""
    _show_mismatches(audit.mismatches)
    if audit.changed:
        show_differences(audit)
    table = Table(title="against the base", show_header=False)
    table.add_row("tensors changed", str(len(audit.changed)))
    added = ", ".join(audit.added[:3]) + (" …" if len(audit.added) > 3 else "")
    changes = ", ".join(f"{key}: {_setting(old)} -> {_setting(new)}" for key, (old, new) in audit.config.items())
    files = "; ".join(f"{name} ({audit.notes[name]})" for name in audit.side_files)
    table.add_row("tensors added", escape(added or "none"))
    table.add_row("tensors missing", escape(", ".join(audit.missing) or "none"))
    table.add_row("identical tensors", str(audit.same))
    table.add_row("configuration", escape(changes or "same"))
    table.add_row("other files that differ", escape(files or "none"))
    table.add_row("the change looks like", escape(audit.verdict()))
    proof = audit.verification
    if proof is not None:
        table.add_section()
        table.add_row("recipe gives the stored bytes", "yes" if proof.rebuilt else "NO")
        if proof.hooks_gap is not None:
            table.add_row("hooks = weights, before rounding", f"largest logit difference {proof.hooks_gap:.2e}")
            table.add_row("hooks against the stored weights", f"{proof.stored_gap:.2e}")
        if proof.renormalised_gap is not None:
            table.add_row(
                "hooks that rescale the stream", f"{proof.renormalised_gap:.2e} (a positive factor per token)"
            )
        if proof.quantization is not None:
            for row in _quantization_rows(proof.quantization):
                table.add_row(*row)
        table.add_row("not explained by the recipe", escape(", ".join(proof.unexpected_changes) or "nothing"))
        table.add_row("verdict", "[green]verified[/]" if proof.passed else "[red]NOT verified[/]")
    console.print(table)


def write_what_streams_can() -> None:
    """Question marks for what a stream cannot write; where that is not UTF-8, tables are ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            unicode = stream.encoding.lower().replace("-", "").startswith("utf")
            stream.reconfigure(encoding=None if unicode else "ascii", errors="replace")


def quieten_libraries(bars: bool = False) -> None:
    """Silence the libraries' own logs and, without `bars`, their progress bars, which would break up ours.

    They read these variables when they are imported, which takes seconds, and is left to those who need them.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not bars:
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own bars as well
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
