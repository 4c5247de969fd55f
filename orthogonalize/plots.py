"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .run import Run
from .selection import MAX_KL, MIN_INDUCE, PRUNED_LAYERS

# Okabe and Ito's colours, told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def candidate_figure(run: Run, method: str) -> Figure:
    """Bypass, induce and KL of every candidate of `method` by layer, a line a position."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    mine = [c for c in run.candidates if c.method == method]
    for i, position in enumerate(run.directions.positions):
        row = sorted((c for c in mine if c.position == position), key=lambda c: c.layer)
        for axis, name in zip(axes, ("bypass", "induce", "kl"), strict=True):
            style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markersize": 3.5, "linewidth": 1}
            axis.plot([c.layer for c in row], [getattr(c, name) for c in row], label=str(position), **style)
    axes[0].axhline(run.info.base_score["positive"], color="grey", linestyle="--", label="unedited")
    axes[1].axhline(run.info.base_score["negative"], color="grey", linestyle="--", label="unedited")
    axes[1].axhline(MIN_INDUCE, color="black", linestyle=":", label="filter")
    axes[2].axhline(MAX_KL, color="black", linestyle=":", label="filter")
    axes[2].set_yscale("symlog", linthresh=1e-3)
    axes[2].set_ylim(bottom=0)
    titles = ("edited out: behaviour score", "added: behaviour score", "edited out: KL on the other side, nats")
    for axis, title in zip(axes, titles, strict=True):
        axis.axvline(run.info.layer_count * (1 - PRUNED_LAYERS) - 0.5, color="black", linestyle=":", linewidth=0.8)
        axis.set(title=title, xlabel="layer")
    axes[0].legend(title="position", fontsize=7)
    figure.suptitle(f"{method}: scores by layer and position")
    return figure  # type: ignore[no-any-return]


def plot_candidates(run: Run, folder: Path) -> None:
    """Write `candidates-METHOD.png` for every method of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    for method in run.info.methods:
        figure = candidate_figure(run, method)
        figure.savefig(folder / f"candidates-{method}.png", dpi=130)
        plt.close(figure)
