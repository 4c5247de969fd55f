"""The options of `sweep` for the values that it tries."""

from __future__ import annotations

from typing import Any

import click

from ._options import together

grid_options = together(
    click.option("--strengths", metavar="S,S", help="Strengths to try, of methods that remove. Default: 1."),
    click.option("--alphas", metavar="A,A", help="Values of alpha to try. Default: each method's own."),
    click.option("--ranks", metavar="K,K", help="Ranks to try, as edit takes them. Default: all directions."),
    click.option(
        "--multipliers",
        metavar="M,M",
        help="Lengths to add, with both signs, in units of the mean difference's. Default: 0.5,1,2.",
    ),
)


def sweep_grid(options: dict[str, Any]) -> Any:
    """The values that a sweep tries, taken out of its options."""
    from ..selection.grid import OPTIONS, SweepGrid

    return SweepGrid.parse(**{name: options.pop(name) for name in OPTIONS})
