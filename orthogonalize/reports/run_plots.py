"""The figures of a run, for `run/plots` and the HTML report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..core.errors import OrthogonalizeError
from ..directions.activation_store import FILE as ACTIVATIONS
from ..directions.activation_store import Recording
from ..directions.finders.registry import FINDERS
from ..selection.candidates import MAX_KL, MIN_INDUCE, Candidate, first_pruned_layer
from ..selection.run_folder import Run
from ..selection.search.objectives import LEFT
from .style import BLUE, COLOURS, MARKERS, SHADES, VERMILION, as_written, ink, legend_beside, screen_style

SIDE_STYLES = {"positive": (VERMILION, "^"), "negative": (BLUE, "o")}
PANELS = 24  # most layers that get a panel each
DRAWS = ", independent draws"


def _subplots(*shape: int, **options: Any) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(*shape, layout="constrained", **options)
    return figure, axes


def _style(i: int) -> dict[str, object]:
    return {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markersize": 3.5, "linewidth": 1}


def _intervals(candidates: Sequence[Candidate], name: str) -> list[tuple[int, float, float]]:
    """Layer and ends of the intervals of the candidates that were scored by all prompts."""
    full = [c for c in candidates if c.induce is not None]
    return [(c.layer, *getattr(c, f"{name}_ci95")) for c in full if getattr(c, f"{name}_ci95") is not None]


def candidate_figure(run: Run, finder: str) -> Figure:
    """Bypass, induce and KL of every candidate of `finder` by layer, a line per position."""
    figure, axes = _subplots(1, 3, figsize=(13, 3.8))
    mine = [c for c in run.candidates if c.finder == finder]
    for i, position in enumerate(run.directions.positions):
        row = sorted((c for c in mine if c.position == position), key=lambda c: c.layer)
        for axis, name in zip(axes, ("bypass", "induce", "kl"), strict=True):
            scored = [(c.layer, getattr(c, name)) for c in row if getattr(c, name) is not None]
            label = run.info.position_name(position)
            axis.plot([layer for layer, _ in scored], [score for _, score in scored], label=label, **_style(i))
            for layer, low, high in _intervals(row, name):
                axis.vlines(layer, low, high, color=COLOURS[i % 7], linewidth=0.8)
    axes[0].axhline(run.info.base_score["positive"], color="grey", linestyle="--", label="unedited")
    axes[1].axhline(run.info.base_score["negative"], color="grey", linestyle="--", label="unedited")
    axes[1].axhline(MIN_INDUCE, color=ink(), linestyle=":", label="filter")
    axes[2].axhline(MAX_KL, color=ink(), linestyle=":", label="filter")
    axes[2].set_yscale("symlog", linthresh=1e-3)
    axes[2].set_ylim(bottom=0)
    titles = ("edited out: behaviour score", "added: behaviour score", "edited out: KL on the other side, nats")
    for axis, title in zip(axes, titles, strict=True):
        axis.axvline(first_pruned_layer(run.info.layer_count) - 0.5, color=ink(), linestyle=":", linewidth=0.8)
        axis.set(title=title, xlabel="layer")
    legend_beside(figure, axes[0], "position")
    title = FINDERS[finder].title
    figure.suptitle(
        f"{title}: scores by layer and position (layers right of the dotted line are excluded; lines up and down: 95% "
        "intervals of what was scored by all prompts)", fontsize=10,
    )  # fmt: skip
    return as_written(figure)


def _best(run: Run, finder: str) -> tuple[int, int]:
    """Position and layer of the best candidate of `finder`, or of the best candidate if `finder` has none."""
    best = next((c for c in run.candidates if c.finder == finder), run.candidates[0])
    return best.position, best.layer


def _directions_at(run: Run, position: int, layer: int) -> dict[str, torch.Tensor]:
    """One unit direction per finder: the mean difference, INLP's first, and the one that LEACE reads."""
    axes = {name: FINDERS.find(name).axis(run.directions, position, layer) for name in run.info.finders}
    return {name: axis for name, axis in axes.items() if axis is not None}


def cosine_series(run: Run) -> dict[str, tuple[list[int], list[float]]]:
    """Layers and cosines of every line of the figure of cosines, by its label: pairs of finders, then draws."""
    position, _ = _best(run, "dim")
    layers = list(range(run.directions.layer_count + 1))
    at = {layer: _directions_at(run, position, layer) for layer in layers}
    found = {}
    for a, b in combinations(run.info.finders, 2):
        both = [layer for layer in layers if a in at[layer] and b in at[layer]]
        if both:
            cosines = [(at[layer][a] @ at[layer][b]).item() for layer in both]
            found[f"{FINDERS[a].title} and {FINDERS[b].title}"] = both, cosines
    for finder, between in run.directions.stability.items():
        here = between[:, run.directions.positions.index(position)]
        found[f"{FINDERS[finder].title}{DRAWS}"] = layers, here.mean(0).tolist()
    return found


def cosine_figure(run: Run) -> Figure | None:
    """Cosines across layers between the finders' directions, and between draws of the prompts; None without either."""
    if len(run.info.finders) < 2 and not run.directions.stability:
        return None
    position, _ = _best(run, "dim")
    figure, axis = _subplots(figsize=(8, 4))
    for i, (label, (layers, cosines)) in enumerate(cosine_series(run).items()):
        axis.plot(layers, cosines, linestyle="--" if label.endswith(DRAWS) else "-", label=label, **_style(i))
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(
        xlabel="layer", ylabel="cosine", title=f"cosines between directions, position {position}", ylim=(-1.05, 1.05)
    )
    legend_beside(figure, axis)
    return figure


def accuracy_curves(run: Run) -> dict[int, list[float]]:
    """Held-out accuracies of INLP's classifiers in their order, by layer, at the best position.

    The last of a layer is that of the classifier that it stopped at, if it did, which is not kept.
    """
    position, _ = _best(run, "inlp")
    found = {}
    for layer in range(run.directions.layer_count + 1):
        subspace = run.directions.subspaces.get((position, layer))
        if subspace is not None and subspace.rank:
            last = [] if subspace.stopped_at is None else [subspace.stopped_at]
            found[layer] = [*subspace.accuracies, *last]
    return found


def accuracy_figure(run: Run) -> Figure:
    """Held-out accuracy of every INLP classifier by its number, one line per layer, at the best position."""
    position, chosen = _best(run, "inlp")
    figure, axis = _subplots(figsize=(8, 4))
    count = run.directions.layer_count
    shades = LinearSegmentedColormap.from_list("shades", plt.get_cmap("cividis")(np.linspace(*SHADES, 256)))
    for layer, curve in accuracy_curves(run).items():
        width = 2.2 if layer == chosen else 0.8
        axis.plot(
            range(1, len(curve) + 1), curve, color=shades(layer / count), linewidth=width, marker=".", markersize=4
        )
    axis.axhline(0.55, color=ink(), linestyle=":", linewidth=0.8, label="INLP stops below")
    scale = plt.cm.ScalarMappable(cmap=shades, norm=plt.Normalize(0, count))
    figure.colorbar(scale, ax=axis, label="layer")
    axis.set(
        xlabel="classifier", ylabel="held-out accuracy",
        title=f"INLP at position {position} (thick: layer {chosen}; a last point below the line is not kept)",
    )  # fmt: skip
    legend_beside(figure, axis)
    return figure


def _projected(run: Run, recording: Recording, position: int, layer: int, rows: torch.Tensor) -> dict[str, np.ndarray]:
    """Val (else train) activations of both sides along `rows` [k, d], centred between the sides and scaled to unit
    standard deviation: [prompts, k]."""
    index = run.directions.positions.index(position)
    found = {}
    for side in SIDE_STYLES:
        split = "val" if recording.count(f"{side}.val") else "train"
        found[side] = (recording.read(f"{side}.{split}", layer)[:, index].double() @ rows.double().mT).numpy()
    middle = (found["positive"].mean(0) + found["negative"].mean(0)) / 2
    spread = np.concatenate([side - middle for side in found.values()]).std(0)
    return {side: (values - middle) / np.where(spread > 0, spread, 1.0) for side, values in found.items()}


def projections(run: Run, recording: Recording) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Every layer with both sides' val prompts along its own mean difference, [prompts, 1], at the best position."""
    position, _ = _best(run, "dim")
    for layer in range(run.directions.layer_count + 1):
        basis = run.directions.basis("dim", position, layer)
        if basis is not None:
            yield layer, _projected(run, recording, position, layer, basis)


def projection_figure(run: Run, recording: Recording) -> Figure:
    """Both sides' val prompts along each layer's own mean difference, by layer, at the best position."""
    position, chosen = _best(run, "dim")
    figure, axis = _subplots(figsize=(13, 4))
    for layer, sides in projections(run, recording):
        for offset, (side, values) in zip((-0.15, 0.15), sides.items(), strict=True):
            colour, marker = SIDE_STYLES[side]
            places = np.full(len(values), layer + offset)
            axis.scatter(places, values[:, 0], s=9, color=colour, marker=marker, alpha=0.6, linewidth=0)
    _side_legend(figure, axis)
    axis.axvline(chosen, color=ink(), linestyle=":", linewidth=0.8)
    axis.set(
        xlabel="layer", ylabel="standard deviations", xlim=(-0.6, run.directions.layer_count + 0.6),
        title=f"both sides along each layer's mean difference, position {position} (dotted: layer {chosen}, the best)",
    )  # fmt: skip
    return figure


def _side_legend(figure: Figure, axis: Axes) -> None:
    for side, (colour, marker) in SIDE_STYLES.items():
        axis.scatter([], [], color=colour, marker=marker, label=side)
    legend_beside(figure, axis)


def planes(run: Run, recording: Recording) -> dict[int, dict[str, np.ndarray]]:
    """Both sides' val prompts on INLP's first two directions, [prompts, 2], by layer; PANELS layers that have two."""
    position, _ = _best(run, "inlp")
    found = {layer: run.directions.subspaces.get((position, layer)) for layer in range(run.directions.layer_count + 1)}
    bases = {layer: space.basis[:2] for layer, space in found.items() if space is not None and space.rank >= 2}
    layers = list(bases)
    if not layers:
        return {}
    picked = sorted({layers[i] for i in np.linspace(0, len(layers) - 1, min(PANELS, len(layers))).round().astype(int)})
    return {layer: _projected(run, recording, position, layer, bases[layer]) for layer in picked}


def plane_figure(run: Run, recording: Recording) -> Figure | None:
    """Both sides' val prompts on INLP's first two directions, one panel per layer; None if no layer has two."""
    position, chosen = _best(run, "inlp")
    picked = planes(run, recording)
    if not picked:
        return None
    columns = min(8, len(picked))
    rows = -(-len(picked) // columns)
    figure, axes = _subplots(rows, columns, figsize=(1.6 * columns, 1.75 * rows + 0.5), squeeze=False)
    for axis in axes.flat[len(picked) :]:
        axis.set_visible(False)
    for axis, (layer, sides) in zip(axes.flat, picked.items(), strict=False):
        for side, values in sides.items():
            colour, marker = SIDE_STYLES[side]
            axis.scatter(
                values[:, 0], values[:, 1], s=7, color=colour, marker=marker, alpha=0.6, linewidth=0, label=side
            )
        axis.set_title(f"layer {layer}", fontsize=8, fontweight="bold" if layer == chosen else "normal")
        axis.set_xticks([])
        axis.set_yticks([])
    legend_beside(figure, axes[0, 0])
    figure.suptitle(f"both sides on INLP's first (across) and second (up) direction, position {position}", fontsize=10)
    return figure


def probe_figure(run: Run) -> Figure | None:
    """Accuracy of a fresh probe before and after each finder's best edit; None without probes."""
    if not run.probes:
        return None
    figure, axis = _subplots(figsize=(8, 0.45 * len(run.probes) + 1.6))
    for i, found in enumerate(reversed(run.probes)):
        axis.plot([found.after, found.before], [i, i], color="grey", linewidth=1)
        axis.scatter(found.before, i, color=BLUE, marker="o", label="before" if not i else None)
        axis.scatter(found.after, i, color=VERMILION, marker="^", label="after" if not i else None)
        axis.plot([found.chance] * 2, [i - 0.3, i + 0.3], color=ink(), linestyle=":", label="chance" if not i else None)
    names = [f"{FINDERS[p.method].title}, rank {p.rank} (layer {p.layer})" for p in reversed(run.probes)]
    axis.set_yticks(range(len(names)), names)
    axis.set(
        xlabel=f"accuracy on {run.probes[0].n} val prompts",
        title="a fresh linear probe, before and after removal",
        xlim=(0.3, 1.03),
    )
    legend_beside(figure, axis)
    return figure


def trial_figure(run: Run) -> Figure | None:
    """KL of every tried edit against the behaviour left, with the numbers of the shortlist; None without trials."""
    if not run.trials:
        return None
    figure, axis = _subplots(figsize=(8, 5))
    listed = run.shortlist
    for trials, colour, marker, label in (
        ([t for t in run.trials if t not in listed], "grey", "o", "tried"),
        (listed, VERMILION, "^", "edit --pick N"),
    ):
        axis.scatter([100 * t.left for t in trials], [t.kl for t in trials], c=colour, marker=marker, label=label)
    axis.scatter([100 * listed[0].before], [0], c=ink(), marker="x", label="unedited")
    for number, trial in enumerate(listed, 1):
        axis.annotate(str(number), (100 * trial.left, trial.kl), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.axvline(100 * LEFT, color=ink(), linestyle=":", linewidth=0.8, label=f"{100 * LEFT:g}%")
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_xlim(left=0)
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.set_ylim(bottom=0)
    axis.set(
        xlabel="behaviour left, % of val prompts", ylabel="KL along the base's own answers, nats per token",
        title="tried edits: the best (1) and the rest of the Pareto front",
    )  # fmt: skip
    legend_beside(figure, axis)
    return figure


def figures(run: Run, recording: Recording) -> Iterator[tuple[str, Figure]]:
    """Every figure of a run, by name."""
    for finder in run.info.finders:
        yield f"candidates-{finder}", candidate_figure(run, finder)
    if run.directions.subspaces:
        yield "inlp-accuracy", accuracy_figure(run)
    yield "projections-dim", projection_figure(run, recording)
    optional = {
        "cosines": cosine_figure(run),
        "projections-inlp": plane_figure(run, recording),
        "probes": probe_figure(run),
        "trials": trial_figure(run),
    }
    for name, figure in optional.items():
        if figure is not None:
            yield name, figure


def run_figures(run: Run) -> dict[str, Figure]:
    """Every figure of a run by name, as Matplotlib figures to show or save; they are those of its folder's `plots`.

    Raises:
        OrthogonalizeError: the run was not read from a folder, or has no activations there.
    """
    if run.folder is None:
        raise OrthogonalizeError("this run was not read from a folder, where its activations are stored")
    with screen_style():
        found = dict(figures(run, Recording(run.folder / ACTIVATIONS)))
    for figure in found.values():
        plt.close(figure)  # out of pyplot's list of open figures; the figure itself stays usable
    return found


def plot_run(run: Run, folder: Path) -> None:
    """Write a run's figures into the folder's `plots`; its activations are read from the same folder."""
    plots = folder / "plots"
    if plots.is_symlink():
        raise OrthogonalizeError(f"{plots} is a symbolic link, and its files would be replaced; remove it")
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.png"):
        old.unlink()
    with screen_style():
        for name, figure in figures(run, Recording(folder / ACTIVATIONS)):
            figure.savefig(plots / f"{name}.png", dpi=130)
            plt.close(figure)
