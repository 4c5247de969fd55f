"""The measures on a run's val prompts by which a sweep chooses among edits, so that its test prompts choose nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.prompts import SIDES
from ..selection.run_folder import Run

EFFECTS = ("refusal", "behaviour")  # suites that measure how much of the behaviour is gone
HARMS = ("loss", "kl")  # suites that measure harm on the run's own prompts, best first


def choosing_suites(suites: Sequence[str]) -> list[str]:
    """Those of `suites` that are also measured on val prompts: every effect, and one harm."""
    return [name for name in EFFECTS if name in suites] + [name for name in HARMS if name in suites][:1]


def why_nothing_is_chosen(run: Run, suites: Sequence[str]) -> str | None:
    """Why a sweep of `run` with `suites` cannot choose among edits on val prompts; None if it can."""
    for either, what in ((EFFECTS, "effect"), (HARMS, "harm")):
        if not set(either) & set(suites):
            return f"no {what} is measured on val prompts (--suite has neither {' nor '.join(either)})"
    for side in SIDES:
        if not run.texts(side, "val"):
            return f"the run has no val prompts on the {side} side"
    return None
