"""Draw the figures of docs/concepts.md: what each map does to two clouds of points in the plane.

    python scripts/draw_concepts.py docs/figures

The maps are the package's own. For `conditional`, the plane shows what a matrix writes, and its inputs have two more
dimensions, by which the edit tells the sides apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from orthogonalize import leace, orthonormal, removal, shift, solve_from_samples
from orthogonalize.reports.style import BLUE, VERMILION

POINTS = 36
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "orthogonalize", "font.size": 10, "font.family": "sans-serif"}
Sides = tuple[torch.Tensor, torch.Tensor]


def inputs() -> Sides:
    """What goes into the matrix on both sides, [points, 4]; it writes the first two."""
    generator = torch.Generator().manual_seed(3)
    positive, negative = torch.randn(2, POINTS, 4, generator=generator, dtype=torch.float64) * 0.5
    positive[:, 1] = 0.6 * positive[:, 1] + 0.5 * positive[:, 0]
    negative[:, 1] = 0.6 * negative[:, 1] + 0.5 * negative[:, 0]
    positive += torch.tensor([1.6, 1.0, 2.0, 0.0])
    negative += torch.tensor([0.4, -0.3, 0.0, 2.0])
    return positive, negative


def maps(positive: torch.Tensor, negative: torch.Tensor) -> dict[str, Sides]:
    """Where every method takes both sides, [points, 2]."""
    before = positive[:, :2], negative[:, :2]
    difference = before[0].mean(0) - before[1].mean(0)
    r = orthonormal(difference[None])
    both = orthonormal(torch.stack([difference, torch.tensor([0.0, 1.0], dtype=torch.float64)]))
    values = [side @ r.mT for side in before]
    fitted = solve_from_samples(r, (positive, values[0]), (negative, values[1]), target_weight=1.0)
    affine = {
        "ablate": removal(r),
        "nullspace": removal(both),
        "reflect": removal(r, 2.0),
        "actadd": shift(-difference),
        "leace": leace(*before).affine(),
    }
    found = {name: (each(before[0]), each(before[1])) for name, each in affine.items()}
    conditional = [h - (x @ fitted.c.mT) @ fitted.r for h, x in zip(before, (positive, negative), strict=True)]
    return found | {"conditional": (conditional[0], conditional[1])}


def draw(before: Sides, after: Sides, file: Path) -> None:
    """One figure: both sides before (hollow) and after (filled), each point's way between, and both means."""
    figure, axis = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
    figure.patch.set_facecolor("white")
    for old, new, colour, marker, label in zip(
        before, after, (VERMILION, BLUE), ("^", "o"), ("shows it", "does not"), strict=True
    ):
        for a, b in zip(old.tolist(), new.tolist(), strict=True):
            axis.plot(*zip(a, b, strict=True), color=colour, alpha=0.25, linewidth=0.7, zorder=1)
        axis.scatter(*old.T, s=18, facecolors="none", edgecolors=colour, marker=marker, alpha=0.7)
        axis.scatter(*new.T, s=18, color=colour, marker=marker, label=label)
        axis.scatter(*new.mean(0), s=110, color=colour, marker=marker, edgecolors="black", zorder=3)
    axis.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.set(aspect="equal", xticks=[], yticks=[])
    axis.legend(loc="best", fontsize=8, frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw all of them into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    positive, negative = inputs()
    with plt.rc_context(STYLE):
        for name, after in maps(positive, negative).items():
            draw((positive[:, :2], negative[:, :2]), after, out / f"{name}.svg")


if __name__ == "__main__":
    main()
