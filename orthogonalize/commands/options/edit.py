"""The options of `edit`."""

from __future__ import annotations

from typing import get_args

import click

from ...checkpoints.quantizing.names import SchemeName
from ...checkpoints.rounding.registry import DEFAULT_ROUNDING, ROUNDING_SCHEMES
from ...core.errors import OrthogonalizeError
from ...core.output_folders import EDITED
from ...directions.finders.registry import FINDERS
from ...edits.methods.registry import DEFAULT, METHODS
from .common import (
    Entry,
    ListingOption,
    Rank,
    choice,
    converted_by,
    description_option,
    download_option,
    finders_by_method,
    force_option,
    number,
    revision_option,
    together,
    words,
)
from .existing import FILE, RECIPE, RUN_FOLDER, NewFolder


def site_strengths(text: str | None) -> dict[str, float] | None:
    """Strengths by site, from `SITE=X` in a comma-separated list; None if none is given."""
    found: dict[str, float] = {}
    for word in words(text):
        site, _, strength = word.partition("=")
        try:
            known = site in found
            found[site] = float(strength)
        except ValueError:
            raise OrthogonalizeError(f"--site-strengths {word!r} is not of the form SITE=X, with a number X") from None
        if known:
            raise OrthogonalizeError(f"--site-strengths: {site} is given twice")
    return found or None


edit_options = together(
    click.option("--out", type=NewFolder(EDITED), help="Folder to create; it appears only when complete."),
    click.option(
        "--cache", metavar="OWNER/NAME", help="Write into the Hub's cache instead, so that this name loads offline."
    ),
    force_option("Replace OUT, or OWNER/NAME, if this tool made it."),
    click.option("--run", type=RUN_FOLDER, help="Run folder written by extract."),
    number("--pick", 1, None, "Make edit N of those that extract lists for the run; default: the best."),
    click.option("--direction", type=FILE, metavar="FILE", help="safetensors, or refusal_direction's direction.pt."),
    click.option(
        "--recipe", type=RECIPE, metavar="FILE|OWNER/NAME", help="Rebuild the edit of this orthogonalize.json."
    ),
    click.option("--method", type=Entry(lambda: list(METHODS)), help=f"Edit method; default: {DEFAULT}."),
    click.option(
        "--scope",
        help="all (default; one for actadd), one, top:50%, layers:3,5-9, upto:12 (stops before layer 12) or from:12.",
    ),
    click.option(
        "--strength",
        type=float,
        help="Scale of the edit, default 1; at 1, ablate, nullspace and leace remove all of the direction.",
    ),
    click.option(
        "--site-strengths",
        metavar="SITE=X,…",
        callback=converted_by(site_strengths),
        help="Scale single write sites besides, as in attn.12=0.5,mlp.3=0; at 0 a site is left as it is.",
    ),
    click.option(
        "--per-layer/--shared", default=None, help="Edit each site along its own layer's direction, or all along one."
    ),
    click.option(
        "--position",
        type=int,
        help="Token position of the direction, from the end: -1, -2, …; default: the run's best.",
    ),
    click.option("--layer", type=int, help="Layer of the direction; default: the run's best."),
    click.option("--rank", type=Rank(), help="Use the first K INLP directions; acc99, acc95: choose K by accuracy."),
    click.option("--orthogonal", is_flag=True, default=None, help="leace only: its orthogonal form."),
    click.option("--alpha", type=float, help="reflect only: 1 projects, 2 mirrors (default)."),
    click.option("--coefficient", type=float, help="actadd only: length to add; default: the mean difference's."),
    choice("--span", ["direction", "positions", "inlp"], None, "conditional only: what is taken out at each site."),
    choice("--components", ["attn", "mlp", "both"], None, "conditional only: the blocks to edit; default both."),
    click.option("--target-weight", type=float, help="conditional only: weight of the target's tokens (default 0.3)."),
    click.option("--preserve-weight", type=float, help="conditional only: weight of what is preserved (default 1)."),
    click.option("--first-weight", type=float, help="conditional only: weight of how answers begin (default 3)."),
    click.option("--ridge", type=float, help="conditional only: regularisation, relative to the inputs (0.01)."),
    click.option(
        "--sequential/--one-reading",
        default=None,
        help="conditional only: read layers behind the edits of earlier ones (default), or all at once.",
    ),
    choice(
        "--to",
        ["zero", "harmless-mean"],
        None,
        "ablate only: bring the component to zero (default), or to that of the negative prompts' mean.",
    ),
    click.option(
        "--finder",
        type=Entry(lambda: list(FINDERS)),
        cls=ListingOption,
        listing=finders_by_method,
        help="Whose directions to use; by default the first of the method's that the run has.",
    ),
    click.option(
        "--rounding",
        type=Entry(lambda: list(ROUNDING_SCHEMES)),
        help=f"Rounding scheme; default: {DEFAULT_ROUNDING} ({ROUNDING_SCHEMES[DEFAULT_ROUNDING].summary}).",
    ),
    choice(
        "--quantize",
        list(get_args(SchemeName)),
        None,
        "Quantise the edited matrices of attention and MLP, as vLLM serves them; needs compressed-tensors.",
    ),
    number("--workers", 1, 1, "Files to write in parallel."),
    choice("--format", ["checkpoint", "lora"], "checkpoint", "lora: a PEFT adapter, if only linear layers change."),
    click.option("--shard", metavar="I/N", help="Write share I of N of the files; OUT appears with the last share."),
    click.option("--link", is_flag=True, help="Hard-link unchanged files instead of copying them."),
    click.option(
        "--device", default="auto", show_default=True, help="Where conditional reads the model: auto, cpu, cuda, …"
    ),
    description_option,
    download_option,
    revision_option,
)
