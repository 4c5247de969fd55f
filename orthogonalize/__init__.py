"""Edit a concept out of, or into, a language model's weights, and prove it.

The commands' functions are `extract`, `edit`, `evaluate`, `push`, `verify`, `sweep`, `judge` and `demo`; they and the
algebra under them are imported from here. Each name is loaded on first use, so that importing the
package, or asking the command line for help, does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands.demo import demo as demo
    from .commands.edit import edit as edit
    from .commands.evaluate import evaluate as evaluate
    from .commands.extract import extract as extract
    from .commands.judge import judge as judge
    from .commands.push import push as push
    from .commands.sweep import sweep as sweep
    from .commands.verify import verify as verify
    from .core.errors import OrthogonalizeError as OrthogonalizeError
    from .core.interventions import AffineMap as AffineMap
    from .core.interventions import Intervention as Intervention
    from .core.interventions import Site as Site
    from .core.interventions import orthonormal as orthonormal
    from .core.interventions import removal as removal
    from .core.interventions import shift as shift
    from .directions.direction_set import Directions as Directions
    from .directions.direction_set import load_direction as load_direction
    from .directions.inlp.nullspace import Subspace as Subspace
    from .directions.inlp.nullspace import Subspaces as Subspaces
    from .directions.inlp.nullspace import inlp as inlp
    from .directions.leace import Eraser as Eraser
    from .directions.leace import Moments as Moments
    from .directions.leace import leace as leace
    from .edits.bake import bake as bake
    from .edits.config import EditConfig as EditConfig
    from .models.hooks import intervened as intervened
    from .selection.candidates import Candidate as Candidate
    from .selection.candidates import rank as rank
    from .selection.run_folder import load_run as load_run
    from .selection.settings import Settings as Settings

_HOMES = {
    "edits.bake": ("bake",),
    "edits.config": ("Choice",),
    "commands.demo": ("demo",),
    "directions.direction_set": ("Directions", "load_direction"),
    "commands.edit": ("edit",),
    "core.errors": ("OrthogonalizeError",),
    "commands.evaluate": ("evaluate",),
    "commands.extract": ("extract",),
    "models.hooks": ("intervened",),
    "commands.push": ("push",),
    "core.interventions": ("AffineMap", "Intervention", "Site", "orthonormal", "removal", "shift"),
    "directions.leace": ("Eraser", "Moments", "leace"),
    "commands.judge": ("judge",),
    "directions.inlp.nullspace": ("Subspace", "Subspaces", "inlp"),
    "selection.run_folder": ("load_run",),
    "selection.candidates": ("Candidate", "rank"),
    "selection.settings": ("Settings",),
    "commands.sweep": ("sweep",),
    "commands.verify": ("verify",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(name for names in _HOMES.values() for name in names)
