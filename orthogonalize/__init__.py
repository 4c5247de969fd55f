"""Edit a concept out of, or into, a language model's weights, and prove it.

The commands' functions are `extract`, `edit`, `evaluate`, `push`, `verify`, `sweep`, `judge` and `demo`; they and the
algebra under them are imported from here. Each name is loaded on first use, so that importing the
package, or asking the command line for help, does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .baking import bake as bake
    from .choices import Choice as Choice
    from .demonstration import demo as demo
    from .directions import Directions as Directions
    from .directions import load_direction as load_direction
    from .editing import edit as edit
    from .errors import OrthogonalizeError as OrthogonalizeError
    from .evaluation import evaluate as evaluate
    from .extraction import extract as extract
    from .hooks import intervened as intervened
    from .hub import push as push
    from .interventions import AffineMap as AffineMap
    from .interventions import Intervention as Intervention
    from .interventions import Site as Site
    from .interventions import orthonormal as orthonormal
    from .interventions import removal as removal
    from .interventions import shift as shift
    from .judge_command import judge as judge
    from .leace import Eraser as Eraser
    from .leace import Moments as Moments
    from .leace import leace as leace
    from .nullspace import Subspace as Subspace
    from .nullspace import Subspaces as Subspaces
    from .nullspace import inlp as inlp
    from .run import load_run as load_run
    from .selection import Candidate as Candidate
    from .selection import rank as rank
    from .settings import Settings as Settings
    from .sweeps import sweep as sweep
    from .verification import verify as verify

_HOMES = {
    "baking": ("bake",),
    "choices": ("Choice",),
    "demonstration": ("demo",),
    "directions": ("Directions", "load_direction"),
    "editing": ("edit",),
    "errors": ("OrthogonalizeError",),
    "evaluation": ("evaluate",),
    "extraction": ("extract",),
    "hooks": ("intervened",),
    "hub": ("push",),
    "interventions": ("AffineMap", "Intervention", "Site", "orthonormal", "removal", "shift"),
    "leace": ("Eraser", "Moments", "leace"),
    "judging": ("judge",),
    "nullspace": ("Subspace", "Subspaces", "inlp"),
    "run": ("load_run",),
    "selection": ("Candidate", "rank"),
    "settings": ("Settings",),
    "sweeps": ("sweep",),
    "verification": ("verify",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(name for names in _HOMES.values() for name in names)
