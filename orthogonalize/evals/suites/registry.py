"""The suites that `--suite` can name. To add one, write a file with an `ENTRIES` tuple and name it in `MODULES`.

Code outside this package calls `SUITES.add(SuiteEntry(...))` instead. Public prompt sets are also suites: they are
declared in `data.benchmarks.PROMPT_SETS` alone. This module and those that it imports do not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from ...core.errors import OrthogonalizeError
from ...core.registry import Registry
from ...data.benchmarks import PROMPT_SETS
from .base import SuiteEntry, SuiteFamily

# In the order of help texts and reports.
MODULES = ("answers", "own_loss", "kl", "other_prompts", "text_losses", "multiple_choice", "lm_eval")
DEFAULT_SUITES = ("refusal", "behaviour", "form", "loss", "kl", "other")

SUITES: Registry[SuiteEntry] = Registry("suite")
FAMILIES: Registry[SuiteFamily] = Registry("suite family")

for _module in MODULES:
    for _entry in import_module(f".{_module}", __package__).ENTRIES:
        if isinstance(_entry, SuiteFamily):
            FAMILIES.add(_entry)
        else:
            SUITES.add(_entry)


def suite_names() -> list[str]:
    """Every value of `--suite`; the last ones stand for a whole family (`lm_eval:TASK`)."""
    return [*SUITES, *PROMPT_SETS, *(family.name + family.argument for family in FAMILIES.values())]


def suite_summaries() -> dict[str, tuple[str, str]]:
    """By value of `--suite`, what it measures and where its data come from ("" for the run's own prompts)."""
    found = {name: (entry.summary, str(entry.source or entry.origin)) for name, entry in SUITES.items()}
    found |= {name: (each.summary, str(each.source)) for name, each in PROMPT_SETS.items()}
    return found | {f.name + f.argument: (f.summary, "the task's own") for f in FAMILIES.values()}


def family_arguments(family: SuiteFamily, names: Sequence[str]) -> list[str]:
    """The arguments in those of `names` that belong to a family."""
    return [name.removeprefix(family.name) for name in names if name.startswith(family.name)]


def check_names(names: Sequence[str]) -> None:
    """Check the names of suites.

    Raises:
        OrthogonalizeError: one is unknown or given twice, or there is none.
    """
    available = f"available: {', '.join(suite_names())}"
    if not names:
        raise OrthogonalizeError(f"--suite is empty; {available}")
    for number, name in enumerate(names):
        if name in names[:number]:
            raise OrthogonalizeError(f"suite {name} is given twice")
        in_family = any(any(family_arguments(family, [name])) for family in FAMILIES.values())
        if name not in SUITES and name not in PROMPT_SETS and not in_family:
            raise OrthogonalizeError(f"unknown suite {name!r}; {available}")


def series_title(key: str) -> str | None:
    """What a report calls the series with a dotted key; None if no entry declares it."""
    return next((e.report_titles[key] for e in SUITES.values() if key in e.report_titles), None)


def has_column(key: str) -> bool:
    """Whether the series with a dotted key gets a column in a sweep's table; one that no entry declares does.

    A preserved set's KL has one where that of harmless prompts does, and no set's forms of answers do.
    """
    match key.split("."):
        case ["kl", "sets", _, name]:
            key = f"kl.{name}"
        case ["suites", "form", _]:
            return False
    entry = next((e for e in SUITES.values() if key in e.report_titles), None)
    return entry is None or key in entry.report_columns
