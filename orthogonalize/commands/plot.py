"""`plot`: one figure of a run, a report or a sweep for a paper, with its numbers beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.errors import OrthogonalizeError, first_line
from ..core.files import check_text, parse_json, write_atomically
from ..core.foreign import check_has
from ..reports.schema import Report, load_report
from ..reports.sweep import Sweep, load_sweep
from ..selection.run_folder import Run, load_run


@dataclass(frozen=True)
class Plotted:
    """What was drawn: its name, its file, the file of its numbers, and what else the source has to draw."""

    name: str
    file: Path
    data: Path
    others: list[str]


def _load(source: Path) -> Run | Report | Sweep:
    """The run, report or sweep at a path, which is its folder or the JSON file in it."""
    if source.name == "run.json" and source.is_file():
        source = source.parent
    if source.is_dir():
        if (source / "sweep.json").is_file():
            return load_sweep(source)
        if (source / "report.json").is_file():
            return load_report(source)
        if any((source / name).is_file() for name in ("run.json", "stages.json")):
            return load_run(source)
        raise OrthogonalizeError(
            f"{source} is not a folder of extract, eval or sweep; give one of those, or its JSON file"
        )
    if not source.is_file():
        raise OrthogonalizeError(f"no run, report or sweep at {source}; extract, eval and sweep make them")
    check_text(source)
    try:
        stored = parse_json(source.read_text("utf-8"))
    except ValueError as error:
        raise OrthogonalizeError(f"{source} is neither a report nor a sweep: {first_line(error)}") from error
    return load_sweep(source) if isinstance(stored, dict) and "variants" in stored else load_report(source)


def _check_out(out: Path, force: bool) -> tuple[str, Path]:
    """The format of OUT, and the file of its numbers, if both files may be written."""
    from ..reports.paper.layout import FORMATS

    kind = out.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise OrthogonalizeError(f"--out {out} must end with {' or '.join(f'.{name}' for name in FORMATS)}")
    data = out.with_suffix(".csv")
    if not out.absolute().parent.is_dir():
        raise OrthogonalizeError(f"--out {out}: there is no folder {out.parent}")
    for file in (out, data):
        if file.is_dir():
            raise OrthogonalizeError(f"{file} is a folder; choose a different --out")
        if not force and (file.exists() or file.is_symlink()):
            raise OrthogonalizeError(f"{file} already exists; choose a different --out, or replace it with --force")
    return kind, data


def plot(
    source: Path | str,
    out: Path | str,
    *,
    figure: str | None = None,
    width: float | None = None,
    force: bool = False,
) -> Plotted:
    """Draw a figure of a run, a report or a sweep as vector graphics, and write its numbers as CSV beside it.

    Fonts are embedded, colours and markers can be told apart by colour-blind readers and in grey, and the title is left
    to the caption.

    Args:
        source: a folder of `extract`, `eval` or `sweep`, or its JSON file.
        out: the file, `.pdf` or `.svg`; the numbers are written to the same name with `.csv`.
        figure: which figure of a run (`trials`, `candidates-dim`, …); by default the first that it has.
        width: inches; by default 3.35, one column of two, or 6.9 for figures of several panels.
        force: replace both files.

    Raises:
        OrthogonalizeError: the source is missing or damaged, has no such figure, or the files cannot be written.
    """
    check_has("matplotlib", "plot")
    from matplotlib import pyplot as plt

    from ..reports.paper.figures import figures_of
    from ..reports.paper.layout import for_print, paper_style, saved
    from ..reports.paper.rows import as_csv

    source, out = Path(source), Path(out)
    kind, data = _check_out(out, force)
    found = figures_of(_load(source))
    name = figure or next(iter(found))
    if name not in found:
        raise OrthogonalizeError(f"{source} has no figure {name!r}; it has {', '.join(found)}")
    wanted = found[name]
    with paper_style():
        drawn = wanted.draw()
        assert drawn is not None
        for_print(drawn, width or wanted.width, wanted.height)
        content = saved(drawn, kind)
        plt.close(drawn)
    write_atomically(data, as_csv(wanted.rows()))
    write_atomically(out, content)
    return Plotted(name, out, data, [other for other in found if other != name])
